"""Sweeps draw each chunk again given all others, until what was drawn first no longer steers.

pytest tests/selection/test_sweeps.py
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.selection_inputs import embeddings_with_logits, noise_of, random_embeddings

from jest_stream.config.selection import Quota
from jest_stream.selection.conditional import (
    ExactSoftmaxScores,
    OwnSigmoidScores,
    PartQueue,
    SigmoidScores,
    SoftmaxScores,
    take,
)
from jest_stream.selection.drawing import DrawRule, Urn
from jest_stream.selection.joint import joint_selection, select_jointly
from jest_stream.selection.quotas import Groups
from jest_stream.selection.sampling import chunk_sizes, gumbel_noise

GREEDY = DrawRule(gain=float("inf"))
RULES = {
    "sigmoid": {},
    "own function": {"score": lambda learner, reference: (learner - reference).clamp_min(-0.1)},
    "softmax": {"loss": "softmax"},
    "exact softmax": {"loss": "softmax", "exact_marginal": True},
}


def scores_given(rule, learner, reference, chosen):
    """The oracle's score of every candidate given those chosen."""
    if rule == "softmax":
        return torch.tensor(naive.softmax_streaming_score(learner, reference, chosen))
    if rule == "exact softmax":
        return torch.tensor(naive.softmax_exact_marginal(learner, reference, chosen))
    matrix = naive.score_matrix(learner, reference)
    if rule == "own function":
        losses = [naive.sigmoid_pair_losses(model) for model in (learner, reference)]
        matrix = RULES[rule]["score"](*losses)
    return matrix.diagonal() + matrix[chosen].sum(0) + matrix[:, chosen].sum(1)


def test_a_sweep_lets_go_of_what_was_drawn_first():
    # Own scores 10, 3, 2, 1. Pairs among {1, 2, 3} are worth 60 either way, those with 0 nothing.
    far, pair = -1000.0, 60.0
    learner = embeddings_with_logits([
        [-10.0, far, far, far],
        [far, -3.0, pair, pair],
        [far, pair, -2.0, pair],
        [far, pair, pair, -1.0]])  # fmt: skip
    arguments = {"batch_size": 3, "num_chunks": 3, "score": "hard_learner", "gain": float("inf")}
    # 0 is best alone; then 1; given both, 2 is worth 2 + 120.
    assert select_jointly(learner, None, **arguments).tolist() == [0, 1, 2]
    # Given 1 and 2, 3 is worth 1 + 240 and 0 still 10.
    assert select_jointly(learner, None, num_sweeps=1, **arguments).tolist() == [3, 1, 2]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [(40, 15, 4, 1), (24, 7, 7, 3), (30, 30, 5, 2)])
def test_choices_are_those_of_the_oracle_that_draws_again(sizes, rule, seed):
    num_examples, batch_size, num_chunks, num_sweeps = sizes
    learner = random_embeddings(num_examples, 16, seed=seed, scale=10.0, bias=-8.0)
    reference = random_embeddings(num_examples, 24, seed=seed + 100, scale=25.0, bias=-8.0)
    selection = joint_selection(
        learner, reference, batch_size=batch_size, num_chunks=num_chunks, num_sweeps=num_sweeps,
        key=seed, step=3, **RULES[rule],
    )  # fmt: skip
    expected = naive.drawn_again(
        lambda chosen: scores_given(rule, learner, reference, chosen),
        sizes=chunk_sizes(batch_size, num_chunks),
        noise=noise_of(seed, 3, num_chunks * (1 + num_sweeps), num_examples),
    )
    assert selection.indices.tolist() == list(itertools.chain(*expected))


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_the_last_chunk_is_a_top_k_of_the_oracles_keys_given_all_others(data):
    """For any sizes, rules and dtypes, given our own other chunks, up to rounding."""
    num_examples = data.draw(st.integers(2, 40), label="B")
    batch_size = data.draw(st.integers(2, num_examples), label="b")
    num_chunks = data.draw(st.integers(2, batch_size), label="chunks")
    num_sweeps = data.draw(st.integers(1, 3), label="sweeps")
    rule = data.draw(st.sampled_from(list(RULES)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    gain = data.draw(st.sampled_from([0.1, 1.0, 10.0]))
    seed = data.draw(st.integers(0, 10**6))
    models = [
        random_embeddings(
            num_examples,
            data.draw(st.integers(4, 40)),
            seed=seed + index,
            scale=data.draw(st.floats(0.5, 60)),
            bias=data.draw(st.floats(-16, 2)),
        )
        for index in range(2)
    ]
    models = [replace(m, image=m.image.to(dtype), text=m.text.to(dtype)) for m in models]
    selected = joint_selection(
        *models, batch_size=batch_size, num_chunks=num_chunks, num_sweeps=num_sweeps,
        rule=DrawRule(gain=gain), key=seed, step=1, **RULES[rule],
    ).indices.tolist()  # fmt: skip
    assert len(set(selected)) == batch_size
    size = chunk_sizes(batch_size, num_chunks)[-1]
    others, last = selected[:-size], selected[-size:]
    scores = scores_given(rule, *models, others).double()
    keys = gain * scores + noise_of(seed, 1, num_chunks * (1 + num_sweeps), num_examples)[-1]
    keys[others] = -torch.inf
    tolerance = 1e-4 * (1 + gain * scores.abs().max().item())
    torch.testing.assert_close(keys[last], keys.topk(size).values, rtol=0, atol=tolerance)


def test_sweeps_of_single_examples_are_the_brute_force_sampler():
    # Sub-batches come up in proportion to e^(sum of the scores of all their pairs). Of the 10 pairs
    # of 5 examples, drawn 1,000 times with 3 sweeps: chi-square with 9 degrees of freedom is above
    # 45 with probability 9e-7. Without sweeps it must be far above.
    scores = torch.tensor([
        [1.5, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.8, 0.0],
        [0.0, 1.0, 0.0, 0.6, 0.2],
        [0.0, 0.8, 0.6, 0.3, 0.0],
        [0.0, 0.0, 0.2, 0.0, 0.0]])  # fmt: skip
    # Losses softplus(x) that are these scores, and next to nothing where they are 0.
    logits = torch.where(scores > 0, scores.expm1().clamp_min(1e-9).log(), -30.0)
    logits.diagonal().neg_()
    learner = embeddings_with_logits(logits.tolist())
    matrix = naive.score_matrix(learner, None)
    num_draws = 1000
    subsets = list(itertools.combinations(range(5), 2))
    weights = torch.tensor([matrix[list(s)][:, list(s)].sum() for s in subsets]).exp()
    expected = num_draws * weights / weights.sum()
    statistics = []
    for num_sweeps in (3, 0):
        counts = Counter(
            tuple(
                joint_selection(
                    learner, None, score="hard_learner", batch_size=2, num_chunks=2,
                    num_sweeps=num_sweeps, key=7, step=step,
                ).indices.sort().values.tolist()
            )
            for step in range(num_draws)
        )  # fmt: skip
        found = torch.tensor([counts[subset] for subset in subsets])
        statistics.append(float(((found - expected) ** 2 / expected).sum()))
    assert statistics[0] < 45 < statistics[1] / 2


def test_a_sweep_finds_the_examples_that_belong_together():
    # 5 lures are worth 6 nats each, alone; of 30 examples any two are worth 2 together; 25 nothing.
    losses = torch.zeros(60, 60)
    losses[5:35, 5:35] = 1.0
    losses.fill_diagonal_(0.0)
    losses[:5, :5] = torch.eye(5) * 6.0
    logits = torch.where(losses > 0, losses.expm1().clamp_min(1e-9).log(), -30.0)
    logits.diagonal().neg_()
    learner = embeddings_with_logits(logits.tolist())
    for key in range(10):
        arguments = {"batch_size": 20, "num_chunks": 4, "key": key, "step": 0}
        plain, swept = (
            joint_selection(
                learner, None, score="hard_learner", num_sweeps=num_sweeps, **arguments
            ).indices
            for num_sweeps in (0, 2)
        )
        # The first 5 are drawn from lures worth 5 e^6 = 2,017 and others worth 55: 4 others among
        # them have probability 8e-5.
        assert (plain < 5).sum() >= 2
        # Given 15 that belong together, one more is worth 30: a lure comes with odds e^-24.
        assert ((swept >= 5) & (swept < 35)).all()


def test_no_sweep_and_one_chunk_leave_the_choice_as_it_is():
    models = random_embeddings(60, seed=0), random_embeddings(60, seed=1)
    arguments = {"batch_size": 20, "key": 3, "step": 1}
    plain = joint_selection(*models, num_chunks=4, **arguments)
    swept = joint_selection(*models, num_chunks=4, num_sweeps=0, **arguments)
    assert torch.equal(plain.indices, swept.indices)
    one, again = (
        joint_selection(*models, num_chunks=1, num_sweeps=sweeps, **arguments) for sweeps in (0, 5)
    )
    assert torch.equal(one.indices, again.indices)


def test_uniform_picks_stay_and_what_is_drawn_by_score_is_drawn_again():
    models = [random_embeddings(120, seed=seed, scale=s) for seed, s in ((0, 10), (9, 20))]
    rule = DrawRule(gain=1e6, uniform_fraction=0.5)
    arguments = {"batch_size": 40, "num_chunks": 4, "rule": rule, "key": 5, "step": 2}
    plain = joint_selection(*models, **arguments).indices.view(4, 10)
    selection = joint_selection(*models, num_sweeps=1, **arguments)
    swept = selection.indices.view(4, 10)
    assert selection.indices.unique().numel() == 40
    assert torch.equal(plain[:, :5], swept[:, :5])
    assert not torch.equal(plain[:, 5:], swept[:, 5:])
    # The last: the best five given all other chunks, the uniform picks of its own aside.
    others, picks = swept[:3].flatten(), swept[3, :5]
    scores = naive.score_matrix(*models)
    given_others = scores.diagonal() + scores[others].sum(0) + scores[:, others].sum(1)
    given_others[torch.cat((others, picks))] = -torch.inf
    assert set(swept[3, 5:].tolist()) == set(given_others.topk(5).indices.tolist())


@pytest.mark.parametrize("fraction", [0.0, 0.4, 0.97])
@pytest.mark.parametrize("num_chunks", [3, 37, 50])
def test_sizes_are_exact_even_if_everything_is_drawn_or_chunks_are_all_uniform(
    fraction, num_chunks
):
    models = random_embeddings(50, seed=0), random_embeddings(50, seed=1)
    selection = joint_selection(
        *models, batch_size=50, num_chunks=num_chunks, num_sweeps=2,
        rule=DrawRule(uniform_fraction=fraction), key=0, step=0,
    )  # fmt: skip
    assert selection.indices.sort().values.tolist() == list(range(50))
    assert selection.is_finite and selection.weights.isfinite().all()
    assert selection.effective_support.shape == (num_chunks,)
    assert (selection.effective_support >= 1 - 1e-6).all()


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_equal_models_leave_a_uniform_choice(loss):
    learner = random_embeddings(100, seed=0)
    selection = joint_selection(
        learner, learner, batch_size=40, num_chunks=4, num_sweeps=2, loss=loss, key=1, step=1
    )
    assert selection.selected_score == 0 and selection.candidate_score == 0
    assert selection.effective_support.tolist() == pytest.approx([70] * 4)


def test_the_selection_reports_the_scores_of_the_last_draws():
    learner = embeddings_with_logits([
        [-100.0, -1000.0, 500.0],
        [-1000.0, -40.0, -1000.0],
        [-1000.0, -1000.0, -10.0]])  # fmt: skip
    selection = joint_selection(
        learner, None, batch_size=2, num_chunks=2, num_sweeps=1, score="hard_learner", key=0, step=0
    )
    assert selection.indices.tolist() == [0, 2]  # false alarm: e^-60
    # Given 2: 0 is worth 600 and 1 is worth 40. Given 0: 2 is worth 510 and 1 is worth 40.
    assert selection.selected_score.item() == pytest.approx((600 + 510) / 2, rel=1e-5)
    assert selection.candidate_score.item() == pytest.approx((320 + 275) / 2, rel=1e-5)
    torch.testing.assert_close(selection.effective_support, torch.ones(2))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_chunks_drawn_again_have_the_effective_support_that_was_asked_for(loss):
    models = [random_embeddings(120, seed=seed, scale=s) for seed, s in ((0, 10), (9, 20))]
    selection = joint_selection(
        *models, batch_size=40, num_chunks=5, num_sweeps=2, loss=loss,
        rule=DrawRule(effective_support=15.0), key=0, step=0,
    )  # fmt: skip
    assert selection.effective_support.tolist() == pytest.approx([15] * 5, rel=1e-5)


@pytest.mark.parametrize("groups", [
    None, Groups([0] * 9 + [1] * 6 + [2] * 3, {0: Quota(floor=0.6), 1: Quota(cap=0.5)})
])  # fmt: skip
def test_probabilities_of_a_draw_made_again_are_those_of_inclusion_given_the_others(groups):
    """1 / probability where an example is drawn, 0 where not, is 1 on average while it is left.

    For each of 18, of which 12 are drawn in 2 draws and the first then again, over 2,000 rounds.
    The mean is nearly normal, and one of 18 is beyond 5 of its deviations with probability 1e-5.
    """
    scores = torch.randn(18, 18, generator=torch.Generator().manual_seed(1)) * 0.25
    errors = torch.zeros(2000, 18, dtype=torch.float64)
    for step in range(len(errors)):
        urn = Urn(18, [6, 6], groups, device=None)
        noise = [gumbel_noise(3, step, turn, urn.positions) for turn in range(3)]
        first = urn.draw(0, scores.diagonal(), gain=1.0, noise=noise[0])
        second = urn.draw(1, scores.diagonal() + scores[first].sum(0), gain=1.0, noise=noise[1])
        urn.put_back(0)
        again = urn.draw(0, scores.diagonal() + scores[second].sum(0), gain=1.0, noise=noise[2])
        assert not set(again.tolist()) & set(second.tolist())
        is_left = torch.ones(18, dtype=torch.bool)
        is_left[second] = False
        errors[step, is_left] -= 1
        errors[step, again] += 1 / urn.probabilities[0]
    deviations = errors.std(0) / len(errors) ** 0.5
    assert (errors.mean(0).abs() < 5 * deviations).all()
    assert deviations.max() < 0.15  # else the test would see nothing


@pytest.mark.parametrize("kind", [
    lambda models: SigmoidScores(models, [1.0, -1.0], forgets=True),
    lambda models: SoftmaxScores(models, [1.0, -1.0], forgets=True),
    lambda models: ExactSoftmaxScores(models, [1.0, -1.0], forgets=True),
    lambda models: OwnSigmoidScores(models, lambda a, b: (a - b) * a, forgets=True),
])  # fmt: skip
def test_what_is_forgotten_leaves_no_trace(kind):
    # At this scale some exponentials are e^50 times as large as others.
    models = random_embeddings(40, seed=1, scale=50.0), random_embeddings(40, seed=2, scale=30.0)
    chunks = [[3, 5, 7], [20], [0, 1, 39], [8, 9], [11]]
    left = [k for k in range(40) if not any(k in chunk for chunk in chunks)]
    conditional, alone = kind(models), kind(models).scores()
    kept: list[list[int]] = []
    for step in "++-+--+++--+--":
        if step == "+":
            kept.append(chunks[len(kept)])
            conditional.condition_on(take(models, torch.tensor(kept[-1])))
        else:
            conditional.forget()
            del kept[0]
        fresh = kind(models)
        for chunk in kept:
            fresh.condition_on(take(models, torch.tensor(chunk)))
        found = conditional.scores()[left]
        torch.testing.assert_close(found, fresh.scores()[left], rtol=2e-6, atol=1e-5)
    assert torch.equal(conditional.scores(), alone)


@settings(deadline=None, max_examples=100)
@given(steps=st.lists(st.booleans(), max_size=60))
def test_a_window_joins_what_was_added_and_not_forgotten(steps):
    window = PartQueue(torch.zeros(1, dtype=torch.int64), torch.add, forgets=True)
    kept: list[int] = []
    for number, is_added in enumerate(steps):
        if is_added or not kept:
            kept.append(2**number)  # every part leaves its own bit in the sum
            window.add(torch.tensor([2**number]))
        else:
            window.forget()
            del kept[0]
        assert window.joined().tolist() == [sum(kept)] and window.num_parts == len(kept)
