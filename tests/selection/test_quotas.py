"""Floors, caps and shares hold in every sub-batch, and the joint score still decides the rest.

pytest tests/selection/test_quotas.py
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import accumulate, combinations

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.selection_inputs import embeddings_with_logits, noise_of, random_embeddings

from jest_stream.config.selection import Quota
from jest_stream.config.sizes import quota_sizes
from jest_stream.errors import ConfigError
from jest_stream.selection.baselines import (
    independent_selection,
    select_independently,
    uniform_selection,
)
from jest_stream.selection.drawing import DrawRule
from jest_stream.selection.joint import joint_selection, select_jointly
from jest_stream.selection.quotas import Groups, plan_bounds
from jest_stream.selection.sampling import chunk_sizes

TENTHS = st.integers(0, 10).map(lambda tenths: tenths / 10)


@pytest.mark.parametrize("quotas, batch_size, least, most", [
    # A floor is rounded up and a cap down: 5 % of 50 are 2.5.
    ([Quota(floor=0.05), Quota(cap=0.05)], 50, [3, 0], [50, 2]),
    # A share is kept to the example: 12.8 is 12 or 13.
    ([Quota(share=0.05), Quota(share=0.5)], 256, [12, 128], [13, 128]),
    # Not 8 of 100, though 0.07 * 100 is 7.000000000000001 in floating point.
    ([Quota(floor=0.07)], 100, [7], [100]),
    # Rounded up, thirds would be 102 of 100.
    ([Quota(floor=1 / 3)] * 3, 100, [34, 33, 33], [100] * 3),
    # 4.8, 4.8, 4.8 and twice 0.32 would be 17 of 16: a group of one stays.
    ([Quota(floor=0.3)] * 3 + [Quota(floor=0.02)] * 2, 16, [5, 5, 4, 1, 1], [16] * 5),
    # Floor and cap between two integers: the floor is met.
    ([Quota(floor=0.05, cap=0.05)], 50, [3], [3]),
    ([Quota(cap=0.0)], 7, [0], [0]),
])  # fmt: skip
def test_shares_become_numbers_of_examples(quotas, batch_size, least, most):
    assert quota_sizes(quotas, batch_size) == (least, most)


def test_a_floor_of_a_twentieth_falls_due_once_in_three_chunks_of_seven():
    #     5 of 100 in 16 chunks: 7, 14, 21, 28, 34, 40, ... examples make 0.35, 0.7, 1.05, 1.4,
    #     1.7, 2.0, 2.3, 2.6, 2.9, 3.2, 3.5, 3.8, 4.1, 4.4, 4.7 and 5, rounded:
    due = [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5]
    plan = plan_bounds([Quota(floor=0.05)], [100, 900], chunk_sizes(100, 16))
    assert [row[0] for row in plan.least] == due
    assert {row[1] for row in plan.least} == {0}  # others have no floor


def test_groups_that_are_due_together_take_turns():
    # Ten tenths in chunks of one: each falls due once, never two in one chunk.
    plan = plan_bounds([Quota(floor=0.1)] * 10, [9] * 10 + [0], [1] * 10)
    assert [sum(row) for row in plan.least] == list(range(1, 11))
    assert plan.least[-1] == [1] * 10 + [0]


def test_what_a_small_group_leaves_open_goes_to_the_others_in_proportion():
    shares = [Quota(share=0.4), Quota(share=0.3), Quota(share=0.3)]
    plan = plan_bounds(shares, [100, 100, 3, 0], [100])
    assert plan.asked[0] == [40, 30, 30, 0]
    assert plan.most == [[56, 41, 3, 0]]  # 97 as 4 to 3
    # With examples that no quota binds it goes to them.
    plan = plan_bounds(shares, [100, 100, 3, 500], [100])
    assert plan.most == [[40, 30, 3, 100]]
    # A cap gives way only as far as nothing else is there.
    plan = plan_bounds([Quota(cap=0.2), Quota(cap=0.0)], [60, 60, 50], [100])
    assert plan.most == [[50, 0, 50]]
    plan = plan_bounds([Quota(cap=0.2), Quota(cap=0.0)], [30, 60, 50], [100])
    assert plan.most == [[30, 20, 50]]


def test_a_plan_by_hand():
    # Half of seven single draws: 3 at least, 4 at most.
    plan = plan_bounds([Quota(share=0.5)], [100, 900], [1] * 7)
    assert [row[0] for row in plan.least] == [0, 1, 1, 2, 2, 3, 3]
    assert [row[0] for row in plan.most] == [1, 2, 2, 3, 3, 4, 4]


@st.composite
def quotas_and_labels(draw):
    """Quotas of up to four groups, the label of each candidate, b and the number of chunks."""
    quotas, room = {}, 10
    for group in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            tenths = draw(st.integers(0, room))
            room -= tenths
            quotas[group] = Quota(share=tenths / 10)
        else:
            tenths = draw(st.integers(0, room))
            room -= tenths
            quotas[group] = Quota(floor=tenths / 10, cap=draw(st.integers(tenths, 10)) / 10)
    # The last label has no quota. Some groups come out small or empty.
    popular = draw(st.lists(st.integers(0, len(quotas)), min_size=1, max_size=6))
    labels = draw(st.lists(st.sampled_from(popular), min_size=8, max_size=60))
    batch_size = draw(st.integers(8, len(labels)))
    return quotas, labels, batch_size, draw(st.integers(1, batch_size))


@settings(deadline=None, max_examples=300)
@given(case=quotas_and_labels())
def test_a_plan_can_always_be_kept(case):
    quotas, labels, batch_size, num_chunks = case
    counts = Counter(labels)
    available = [counts[group] for group in range(len(quotas) + 1)]
    sizes = chunk_sizes(batch_size, num_chunks)
    plan = plan_bounds(list(quotas.values()), available, sizes)
    before = [0] * len(available)
    for size, end, least, most in zip(sizes, accumulate(sizes), plan.least, plan.most, strict=True):
        assert all(low <= high for low, high in zip(least, most, strict=True))
        # After any draws within the bounds so far, this draw can be kept within them.
        assert sum(now - then for now, then in zip(least, before, strict=True)) <= size
        assert all(now >= then for now, then in zip(least, before, strict=True))
        assert sum(most) >= end
        before = least
        # In proportion: never more than the next integer above it.
        for due, total in zip(least, plan.least[-1], strict=True):
            assert due < Fraction(total * end, batch_size) + 1
    for low, high, asked, there in zip(
        plan.least[-1], plan.most[-1], plan.asked[0], available, strict=True
    ):
        assert low == min(asked, there) and high <= there


@settings(deadline=None, max_examples=150)
@given(
    case=quotas_and_labels(),
    seed=st.integers(0, 10**6),
    fraction=TENTHS,
    num_sweeps=st.integers(0, 2),
)
def test_sizes_are_exact_and_quotas_kept_whenever_they_can_be(case, seed, fraction, num_sweeps):
    quotas, labels, batch_size, num_chunks = case
    models = [random_embeddings(len(labels), 8, seed=seed + i, scale=5.0) for i in (0, 1)]
    rule = DrawRule(groups=Groups(labels, quotas), uniform_fraction=min(fraction, 0.9))
    selection = joint_selection(
        *models, batch_size=batch_size, num_chunks=num_chunks, num_sweeps=num_sweeps, rule=rule,
        key=seed, step=0,
    )  # fmt: skip
    selected = selection.indices.tolist()
    assert len(selected) == len(set(selected)) == batch_size
    there, found = Counter(labels), Counter(labels[k] for k in selected)
    least, most = quota_sizes(list(quotas.values()), batch_size)
    room = sum(min(most[g], there[g]) for g in quotas) + there[len(quotas)]
    for group in quotas:
        assert found[group] >= min(least[group], there[group])
        if room >= batch_size:  # the caps leave enough to fill the sub-batch with
            assert found[group] <= most[group]
    assert selection.group_counts.tolist() == [found[group] for group in quotas]
    assert selection.quota_excess.tolist() == [
        max(0, found[g] - most[g]) - max(0, least[g] - found[g]) for g in quotas
    ]
    assert selection.weights.mean().item() == pytest.approx(1, rel=1e-4)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_one_draw_takes_the_best_set_that_keeps_to_the_bounds(data):
    """Brute force: of all subsets within the bounds, the one with the largest sum of keys."""
    labels = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=9))
    batch_size = data.draw(st.integers(2, len(labels) - 1))
    quotas = {0: Quota(floor=0.5), 1: Quota(cap=0.3)}
    seed = data.draw(st.integers(0, 1000))
    models = [random_embeddings(len(labels), 4, seed=seed + i, scale=3.0) for i in (0, 1)]
    selection = independent_selection(
        *models,
        batch_size=batch_size,
        rule=DrawRule(groups=Groups(labels, quotas)),
        key=seed,
        step=0,
    )
    keys = naive.score_matrix(*models).diagonal() + noise_of(seed, 0, 1, len(labels))[0]
    there = Counter(labels)
    plan = plan_bounds(list(quotas.values()), [there[g] for g in range(3)], [batch_size])

    def is_allowed(subset):
        counts = Counter(labels[k] for k in subset)
        return all(plan.least[0][g] <= counts[g] <= plan.most[0][g] for g in range(3))

    subsets = filter(is_allowed, combinations(range(len(labels)), batch_size))
    best = max(subsets, key=lambda subset: keys[list(subset)].sum())
    assert set(selection.indices.tolist()) == set(best)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_examples, batch_size, num_chunks", [(60, 20, 4), (150, 40, 7)])
@pytest.mark.parametrize("num_sweeps", [0, 2])
def test_choices_are_those_of_the_papers_listing_within_bounds(
    num_sweeps, num_examples, batch_size, num_chunks, seed
):
    models = [random_embeddings(num_examples, 16, seed=seed + i, scale=8.0) for i in (0, 100)]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num_examples,), generator=generator)
    quotas = {2: Quota(floor=0.4), 0: Quota(cap=0.1), 3: Quota(share=0.25)}
    selection = joint_selection(
        *models,
        batch_size=batch_size,
        num_chunks=num_chunks,
        num_sweeps=num_sweeps,
        rule=DrawRule(groups=Groups(labels, quotas)),
        key=seed,
        step=3,
    )
    members = [{2: 0, 0: 1, 3: 2, 1: 3}[label] for label in labels.tolist()]
    there, sizes = Counter(members), chunk_sizes(batch_size, num_chunks)
    plan = plan_bounds(list(quotas.values()), [there[group] for group in range(4)], sizes)
    expected = naive.listing_within(
        naive.score_matrix(*models),
        members,
        sizes=sizes,
        least=plan.least,
        most=plan.most,
        noise=noise_of(seed, 3, num_chunks * (1 + num_sweeps), num_examples),
    )
    assert selection.indices.tolist() == expected


def test_a_floor_takes_the_best_of_its_group_and_conditions_what_follows():
    # Own scores: 0: 90, 1: 80, 2: 1, 3: 2. Group "b" is {2, 3}; the pair (3, 1) is worth 50.
    far = -1000.0
    learner = embeddings_with_logits([
        [-90.0, far, far, far],
        [far, -80.0, far, 50.0],
        [far, far, -1.0, far],
        [far, far, far, -2.0]])  # fmt: skip
    groups = Groups(["a", "a", "b", "b"], {"b": Quota(floor=0.5)})
    arguments = {"batch_size": 2, "score": "hard_learner", "gain": float("inf")}
    chosen = select_jointly(learner, None, num_chunks=2, groups=groups, **arguments)
    # One of two falls due in the first chunk already: 3, which makes 1 worth 130 against 90.
    assert chosen.tolist() == [3, 1]
    assert select_jointly(learner, None, num_chunks=2, **arguments).tolist() == [0, 1]
    assert select_independently(learner, None, groups=groups, **arguments).tolist() == [0, 3]


def test_joint_selection_within_quotas_scores_above_selecting_group_by_group():
    # Mean score of the sub-batch over 20 seeds, both with the same numbers of each group.
    together = apart = 0.0
    for seed in range(20):
        models = [random_embeddings(240, 8, seed=seed + i, scale=s) for i, s in ((0, 8), (50, 20))]
        labels = torch.arange(240) % 3
        quotas = {0: Quota(share=0.5), 1: Quota(share=0.25), 2: Quota(share=0.25)}
        rule = DrawRule(groups=Groups(labels, quotas))
        scores = naive.score_matrix(*models)
        chosen = joint_selection(
            *models, batch_size=48, num_chunks=8, rule=rule, key=seed, step=0
        ).indices
        assert Counter(labels[chosen].tolist()) == {0: 24, 1: 12, 2: 12}
        together += scores[chosen][:, chosen].sum().item()
        parts = []
        for group, size in ((0, 24), (1, 12), (2, 12)):
            rows = (labels == group).nonzero()[:, 0]
            part = [
                type(m)(image=m.image[rows], text=m.text[rows], logit_scale=m.logit_scale,
                        logit_bias=m.logit_bias)
                for m in models
            ]  # fmt: skip
            found = joint_selection(
                *part, batch_size=size, num_chunks=8, key=seed, step=group + 1
            ).indices
            parts.append(rows[found])
        chosen = torch.cat(parts)
        apart += scores[chosen][:, chosen].sum().item()
    assert together > apart


def test_uniform_selection_keeps_quotas_and_is_uniform_within_them():
    # 6 of 10 from group 0 and 4 from the 40 others. Each of 10 is drawn with probability 0.6, each
    # of 40 with 0.1; over 2000 draws no count is 6.5 deviations off but with probability 1e-8.
    labels = [0] * 10 + [1] * 40
    groups = Groups(labels, {0: Quota(share=0.6)})
    counts = torch.zeros(50)
    for step in range(2000):
        counts[uniform_selection(50, batch_size=10, groups=groups, key=0, step=step).indices] += 1
    for part, p in ((counts[:10], 0.6), (counts[10:], 0.1)):
        assert (part - 2000 * p).abs().max() < 6.5 * (2000 * p * (1 - p)) ** 0.5


def test_quotas_that_bind_nothing_change_nothing():
    models = random_embeddings(80, seed=0), random_embeddings(80, seed=1)
    plain = joint_selection(*models, batch_size=20, num_chunks=4, key=0, step=0)
    rule = DrawRule(groups=Groups(torch.arange(80) % 2, {0: Quota(), 1: Quota(floor=0.0)}))
    bound = joint_selection(*models, batch_size=20, num_chunks=4, rule=rule, key=0, step=0)
    assert bound.indices.tolist() == plain.indices.tolist()
    torch.testing.assert_close(bound.weights, plain.weights)
    assert bound.group_counts.sum() == 20 and bound.quota_excess.tolist() == [0, 0]
    assert plain.group_counts.shape == plain.quota_excess.shape == (0,)


@pytest.mark.parametrize("options, message", [
    ({"floor": -0.1}, r"Quota.floor must be a share in \[0, 1\], got -0.1"),
    ({"cap": 1.5}, r"Quota.cap must be a share in \[0, 1\], got 1.5"),
    ({"share": float("nan")}, "Quota.share must be a share"),
    ({"floor": 0.5, "cap": 0.4}, "Quota.floor=0.5 is above cap=0.4"),
    ({"share": 0.2, "cap": 0.4}, "Quota.share=0.2 is floor and cap in one, got floor=0.0 and cap="),
])  # fmt: skip
def test_quotas_that_cannot_be_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        Quota(**options)


def test_more_floors_than_room_are_errors():
    half = {name: Quota(floor=0.4) for name in "abc"}
    with pytest.raises(ConfigError, match="add up to 1.2, more than there is room for.*Lower"):
        Groups(["a"] * 9, half)
    many = Groups(list(range(40)), {name: Quota(floor=0.01) for name in range(30)})
    models = random_embeddings(40, seed=0), random_embeddings(40, seed=1)
    with pytest.raises(ConfigError, match="at least 30 examples.*batch_size=16 has no room.*join"):
        select_jointly(*models, batch_size=16, groups=many)


@pytest.mark.parametrize("labels, message", [
    ([0] * 39, "group of each of the 40 candidates, got 39 labels"),
    (torch.zeros(40, 1, dtype=torch.int64), r"\[B\] integers on the CPU.*got \[40, 1\]"),
    (torch.zeros(40), r"got \[40\] torch.float32 on cpu"),
    (torch.zeros(40, dtype=torch.int64, device="meta"), "on meta"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_errors(labels, message):
    models = random_embeddings(40, seed=0), random_embeddings(40, seed=1)
    with pytest.raises(ConfigError, match=message):
        select_jointly(*models, batch_size=16, groups=Groups(labels, {0: Quota(floor=0.1)}))


def test_what_is_no_quota_is_an_error():
    with pytest.raises(ConfigError, match="must be Quota objects, got 0.2 for group 'a'"):
        Groups(["a"], {"a": 0.2})
