"""Effective support hits its target, uniform picks their number, weights undo the selection.

pytest tests/selection/test_draw_rules.py
"""

from __future__ import annotations

import math

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.selection_inputs import noise_of, random_embeddings

from jest_stream.config.selection import Quota
from jest_stream.errors import ConfigError, NonFiniteError
from jest_stream.selection.baselines import (
    independent_selection,
    select_independently,
    uniform_selection,
)
from jest_stream.selection.drawing import DrawRule, Urn
from jest_stream.selection.joint import joint_selection, select_jointly
from jest_stream.selection.quotas import Groups
from jest_stream.selection.sampling import (
    effective_support,
    gain_for_support,
    gumbel_noise,
    inclusion_probabilities,
    inverse_probability_weights,
    uniform_sizes,
)


def models(num_examples=120, *, seed=0):
    return [random_embeddings(num_examples, seed=seed + i, scale=s) for i, s in ((0, 10), (9, 20))]


def support_at(gain, scores):
    return float(effective_support(scores.double() * gain))


def test_the_gain_of_two_candidates_is_found_in_closed_form():
    # p = (q, 1 - q) has support 1.25 = 1 / (q^2 + (1 - q)^2) at q = 1/2 + sqrt(0.15).
    q = 0.5 + 0.15**0.5
    scores = torch.tensor([3.0, -torch.inf, 1.0])
    gain = gain_for_support(1.25, scores)
    assert gain.item() == pytest.approx(math.log(q / (1 - q)) / 2, rel=1e-6)


@settings(deadline=None, max_examples=100)
@given(
    scores=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=50),
    unit=st.sampled_from([1e-12, 1.0, 1e9]),
    share=st.floats(0, 1),
)
def test_a_support_that_can_be_had_is_had_and_others_are_approached(scores, unit, share):
    values = torch.tensor(scores, dtype=torch.float64) * unit
    num_best = int((values == values.max()).sum())
    target = 1 + share * (len(scores) - 1)
    found = support_at(gain_for_support(target, values), values - values.max())
    # Candidates closer than 2^-40 of the spread to the best are as good as it.
    num_close = int((values >= values.max() - (values.max() - values.min()) * 1e-10).sum())
    if num_best == num_close and target > num_best:
        assert found == pytest.approx(target, rel=1e-6)
    else:
        assert num_best - 1e-6 <= found <= max(target, num_close) + 1e-6


@pytest.mark.parametrize("support", [1.5, 10.0, 60.0])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_every_chunk_has_the_effective_support_that_was_asked_for(loss, support):
    rule = DrawRule(effective_support=support)
    selection = joint_selection(
        *models(), batch_size=40, num_chunks=5, loss=loss, rule=rule, key=0, step=0
    )
    assert selection.effective_support.tolist() == pytest.approx([support] * 5, rel=1e-5)
    alone = independent_selection(*models(), batch_size=40, loss=loss, rule=rule, key=0, step=0)
    assert alone.effective_support.tolist() == pytest.approx([support], rel=1e-5)


def test_a_support_of_all_is_uniform_and_of_one_takes_the_best():
    arguments = {"batch_size": 40, "num_chunks": 5, "key": 3, "step": 1}
    everything = joint_selection(*models(), rule=DrawRule(effective_support=1e6), **arguments)
    assert everything.effective_support.tolist() == pytest.approx([120, 112, 104, 96, 88], rel=1e-4)
    assert torch.equal(everything.indices[:8], noise_of(3, 1, 1, 120)[0].topk(8).indices)
    one = joint_selection(*models(), rule=DrawRule(effective_support=1), **arguments)
    assert one.effective_support.tolist() == pytest.approx([1] * 5)
    assert one.indices[0] == naive.score_matrix(*models()).diagonal().argmax()


def test_a_gain_found_draws_as_the_same_gain_given():
    arguments = {"batch_size": 40, "num_chunks": 1, "key": 3, "step": 1}
    own = naive.score_matrix(*models()).diagonal().float()
    gain = float(gain_for_support(12.0, own))
    found = joint_selection(*models(), rule=DrawRule(effective_support=12.0), **arguments)
    given_gain = joint_selection(*models(), rule=DrawRule(gain=gain), **arguments)
    assert found.indices.tolist() == given_gain.indices.tolist()


def test_equal_scores_have_the_support_of_all_whatever_is_asked():
    learner = models()[0]
    for support in (1.0, 5.0, 500.0):
        selection = joint_selection(
            learner, learner, batch_size=40, num_chunks=2,
            rule=DrawRule(effective_support=support), key=0, step=0,
        )  # fmt: skip
        assert selection.effective_support.tolist() == pytest.approx([120, 100])
        assert selection.is_finite


@pytest.mark.parametrize("sizes, fraction, expected", [
    ([3, 3, 2, 2], 0.1, [0, 1, 0, 0]),
    ([16] * 4, 0.1, [2, 1, 2, 1]),  # 1.6, 3.2, 4.8, 6.4
    ([1] * 8, 0.25, [0, 1, 0, 0, 0, 1, 0, 0]),
    ([5, 5], 0.0, [0, 0]),
    ([10], 0.99, [10]),
])  # fmt: skip
def test_uniform_picks_are_spread_over_the_chunks(sizes, fraction, expected):
    assert uniform_sizes(sizes, fraction) == expected


@pytest.mark.parametrize("fraction, num_uniform", [(0.1, [2, 2, 2, 2]), (0.5, [10, 10, 10, 10])])
def test_uniform_picks_ignore_the_scores_and_the_others_follow_them(fraction, num_uniform):
    # At this gain what is drawn by score is the best, and nothing else is.
    selection = joint_selection(
        *models(), batch_size=80, num_chunks=4,
        rule=DrawRule(gain=1e6, uniform_fraction=fraction), key=5, step=2,
    )  # fmt: skip
    selected = selection.indices.tolist()
    assert len(set(selected)) == 80
    scores, first = naive.score_matrix(*models()), 0
    for chunk, uniform in enumerate(num_uniform):
        before = selected[:first]
        noise = gumbel_noise(5, 2, ~chunk, torch.arange(120))
        noise[before] = -torch.inf
        picks = noise.topk(uniform).indices.tolist()
        assert selected[first : first + uniform] == picks
        given_before = scores.diagonal() + scores[before].sum(0) + scores[:, before].sum(1)
        given_before[before + picks] = -torch.inf
        best = given_before.topk(20 - uniform).indices.tolist()
        assert set(selected[first + uniform : first + 20]) == set(best)
        first += 20


def test_uniform_picks_come_up_alike_and_with_the_share_that_was_asked_for():
    # Scores so far apart that the same 10 of 60 are always drawn by score; 10 more are uniform
    # from all 60 and come first. Of the 40 lowest each is drawn with probability 1/6: over 3000
    # draws no count is 6 deviations off but with probability 1e-7.
    terms = torch.zeros(60)
    terms[:20] = 1e5 - 1e3 * torch.arange(20)
    learner = random_embeddings(60, seed=0)
    counts = torch.zeros(60)
    rule = DrawRule(uniform_fraction=0.5, terms=terms)
    for step in range(3000):
        counts[
            independent_selection(
                learner, None, score="hard_learner", batch_size=20, rule=rule, key=0, step=step
            ).indices
        ] += 1
    assert (counts[:10] == 3000).all()
    assert (counts[20:] - 500).abs().max() < 6 * (3000 * 5 / 36) ** 0.5


def test_quotas_bind_uniform_picks_too():
    labels = [0] * 100 + [1] * 20
    rule = DrawRule(uniform_fraction=0.5, groups=Groups(labels, {1: Quota(share=0.5)}))
    selection = joint_selection(*models(), batch_size=40, num_chunks=4, rule=rule, key=0, step=0)
    assert selection.group_counts.tolist() == [20]
    assert sum(k >= 100 for k in selection.indices[:5].tolist()) in (2, 3)  # uniform, first chunk


def test_an_inclusion_probability_worked_out_by_hand():
    # P(log 3 + Gumbel > 0) = 1 - exp(-3).
    scores, thresholds = (
        torch.tensor([math.log(3), 5.0, -800.0]),
        torch.tensor([0, -math.inf, -800]),
    )
    found = inclusion_probabilities(scores.double(), thresholds.double(), 1.0)
    expected = [1 - math.exp(-3), 1, 1 - math.exp(-1)]
    assert found.tolist() == pytest.approx(expected)
    assert inclusion_probabilities(scores, thresholds, math.inf).tolist() == [1, 1, 1]
    # 2, 1 and 4, of mean 7/3.
    weights = inverse_probability_weights(torch.tensor([0.5, 1.0, 0.25]))
    assert weights.tolist() == pytest.approx([6 / 7, 3 / 7, 12 / 7])


RULES = {
    "by score": {},
    "with uniform picks": {"uniform_fraction": 0.5},
    "within quotas": {
        "groups": Groups([0] * 9 + [1] * 6 + [2] * 3, {0: Quota(floor=0.6), 1: Quota(cap=0.5)})
    },
}


@pytest.mark.parametrize("name", RULES)
def test_probabilities_are_those_of_inclusion(name):
    """1 / probability where an example is drawn, 0 where not, is 1 on average while it is left.

    For each of 18, over 2,000 sub-batches of 12 in 2 chunks, the second conditioned on the first.
    (Draws of one or two would have too heavy tails.) The mean is nearly normal, and one of 18 is
    beyond 5 of its deviations with probability 1e-5.
    """
    rule = DrawRule(**RULES[name])
    scores = torch.randn(18, 18, generator=torch.Generator().manual_seed(1)) * 0.25
    uniform = uniform_sizes([6, 6], rule.uniform_fraction)
    draws = [size for u in uniform for size in (u, 6 - u) if size]
    errors = torch.zeros(2000, 18, dtype=torch.float64)
    for step in range(len(errors)):
        numbers = iter(range(len(draws)))
        urn, running = Urn(18, draws, rule.groups, device=None), scores.diagonal()
        is_left = torch.ones(18, dtype=torch.bool)
        for chunk, num_uniform in enumerate(uniform):
            for size, number in ((num_uniform, ~chunk), (6 - num_uniform, chunk)):
                if size == 0:
                    continue
                noise = gumbel_noise(3, step, number, urn.positions)
                by = torch.zeros(18) if number < 0 else running
                draw = next(numbers)
                drawn = urn.draw(draw, by, gain=1.0, noise=noise)
                errors[step, is_left] -= 1
                errors[step, drawn] += 1 / urn.probabilities[draw]
                is_left[drawn] = False
            running = scores.diagonal() + scores[~is_left].sum(0)
    deviations = errors.std(0) / len(errors) ** 0.5
    assert (errors.mean(0).abs() < 5 * deviations).all()
    assert deviations.max() < 0.15  # of a sum of 1 to 4 ones: else the test would see nothing


def test_weights_have_mean_one_and_undo_most_of_a_selection():
    # Mean of f over all against its weighted mean over the selected, on 300 sub-batches.
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(200, generator=generator)
    f = terms + torch.randn(200, generator=generator)
    learner, weighted, plain = random_embeddings(200, seed=0), 0.0, 0.0
    rule = DrawRule(terms=terms)
    for step in range(300):
        selection = joint_selection(
            learner, learner, batch_size=40, num_chunks=4, rule=rule, key=0, step=step
        )
        assert selection.weights.shape == (40,) and (selection.weights > 0).all()
        assert selection.weights.view(4, 10).mean(1).tolist() == pytest.approx([1] * 4, rel=1e-5)
        chosen = f[selection.indices]
        weighted += float((selection.weights * chosen).mean() - f.mean()) / 300
        plain += float(chosen.mean() - f.mean()) / 300
    assert abs(weighted) < plain / 5


def test_weights_of_a_uniform_choice_of_all_and_of_the_best_are_one():
    for selection in (
        uniform_selection(50, batch_size=20, key=0, step=0),
        joint_selection(*models(50), batch_size=50, num_chunks=1, key=0, step=0),
        joint_selection(
            *models(50), batch_size=20, num_chunks=4, rule=DrawRule(gain=math.inf), key=0, step=0
        ),
    ):
        torch.testing.assert_close(selection.weights, torch.ones(len(selection.indices)))


def test_terms_are_added_to_the_scores_before_the_gain():
    terms = torch.randn(120, generator=torch.Generator().manual_seed(0)) * 30
    selection = joint_selection(
        *models(), batch_size=40, num_chunks=5, rule=DrawRule(gain=0.5, terms=terms), key=1, step=0
    )
    scores = naive.score_matrix(*models())
    with_terms = scores + terms.double().diag()
    expected, _ = naive.paper_listing(
        with_terms, batch_size=40, num_chunks=5, noise=noise_of(1, 0, 5, 120), gain=0.5
    )
    assert selection.indices.tolist() == expected.tolist()


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_a_term_that_outweighs_everything_decides(loss):
    terms = torch.zeros(120, dtype=torch.float64)
    terms[7], terms[9], terms[11] = 1e6, 2e6, -1e6
    generator = torch.Generator().manual_seed(0)
    arguments = {"batch_size": 119, "loss": loss, "terms": terms, "generator": generator}
    selected = select_jointly(*models(), num_chunks=119, **arguments)
    assert selected[:2].tolist() == [9, 7] and 11 not in selected.tolist()
    assert 11 not in select_independently(*models(), **arguments).tolist()


@pytest.mark.parametrize("options, message", [
    ({"effective_support": 5, "gain": 2.0}, "effective_support=5 finds the gain, but gain=2.0 is"),
    ({"effective_support": 0.5}, "effective_support must be a finite number of at least 1, "),
    ({"effective_support": math.inf}, "effective_support must be a finite number"),
    ({"effective_support": math.nan}, "effective_support must be a finite number"),
    ({"uniform_fraction": 1.0}, r"uniform_fraction must be in \[0, 1\), got 1.0.*select_uniformly"),
    ({"uniform_fraction": -0.1}, r"uniform_fraction must be in \[0, 1\), got -0.1"),
    ({"terms": torch.zeros(119)}, r"terms must hold one number for each of the 120.*got .*\[119\]"),
    ({"terms": torch.zeros(120, 1)}, r"got shape \[120, 1\]"),
    ({"terms": torch.zeros(120, device="meta")}, r"terms are on meta, the embeddings on cpu"),
])  # fmt: skip
@pytest.mark.parametrize("select", [select_jointly, select_independently])
def test_rules_that_cannot_be_followed_are_errors(select, options, message):
    with pytest.raises(ConfigError, match=message):
        select(*models(), batch_size=40, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_terms_that_are_not_finite_are_named(bad):
    terms = torch.zeros(120)
    terms[17] = bad
    with pytest.raises(NonFiniteError, match="terms hold NaN or infinity, the first of them at 17"):
        select_jointly(*models(), batch_size=40, terms=terms)
