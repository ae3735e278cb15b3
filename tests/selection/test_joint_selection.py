"""Joint selection chooses what the paper's listing chooses under the same noise.

pytest tests/selection/test_joint_selection.py
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

from jest_stream.selection.baselines import select_independently
from jest_stream.selection.drawing import DrawRule
from jest_stream.selection.joint import joint_selection, select_jointly
from jest_stream.selection.scores import WeightedScore, hard_learner

GREEDY = DrawRule(gain=float("inf"))


def test_a_strong_pair_beats_a_strong_example():
    # Learner losses softplus(x), on the diagonal softplus(-x). Scores by hand:
    #                               txt0     txt1    txt2     txt3
    learner = embeddings_with_logits([
        [-100.0, -1000.0, -1000.0, 500.0],    # 0 is drawn first; its pair with 3 is worth 500
        [-1000.0, 1000.0, -1000.0, -1000.0],
        [-1000.0, -1000.0, -50.0, -1000.0],   # 2 alone is worth 50
        [-1000.0, -1000.0, -1000.0, 1000.0]])  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    arguments = {"batch_size": 2, "score": "hard_learner", "generator": generator}
    # False alarm: e^-50 each.
    assert select_jointly(learner, None, num_chunks=2, **arguments).tolist() == [0, 3]
    assert select_independently(learner, None, **arguments).tolist() == [0, 2]


def test_what_both_models_find_hard_is_left_out():
    # Own pairs only. Example 0 is noise: hard for both. 1 is known: easy for both. 2 is learnable.
    hard, easy = -300.0, 300.0
    other = -300.0
    learner = embeddings_with_logits([
        [hard, other, other], [other, easy, other], [other, other, hard]])  # fmt: skip
    reference = embeddings_with_logits([
        [hard, other, other], [other, easy, other], [other, other, easy]])  # fmt: skip
    # False alarm: 2 e^-300.
    for key in range(20):
        assert joint_selection(
            learner, reference, batch_size=1, num_chunks=1, key=key, step=0
        ).indices.tolist() == [2]


def test_the_selection_reports_the_scores_it_drew_by():
    learner = embeddings_with_logits([
        [-100.0, -1000.0, 500.0],
        [-1000.0, -40.0, -1000.0],
        [-1000.0, -1000.0, -10.0]])  # fmt: skip
    selection = joint_selection(
        learner, None, batch_size=2, num_chunks=2, score=hard_learner, key=0, step=0
    )
    assert selection.indices.tolist() == [0, 2]  # false alarm: e^-60
    # Of the first draw all three were candidates, of the second the other two.
    offered = ((100 + 40 + 10) / 3, (40 + 510) / 2)
    assert selection.candidate_score.item() == pytest.approx(sum(offered) / 2, rel=1e-5)
    assert selection.selected_score.item() == pytest.approx((100 + 510) / 2, rel=1e-5)
    torch.testing.assert_close(selection.effective_support, torch.ones(2))
    assert selection.is_finite


SIZES = [(64, 16, 4), (100, 37, 5), (257, 100, 16), (300, 300, 7), (50, 50, 50), (40, 1, 1)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_examples, batch_size, num_chunks", SIZES)
def test_choices_are_those_of_the_papers_listing(num_examples, batch_size, num_chunks, seed):
    learner = random_embeddings(num_examples, 16, seed=seed, scale=10.0, bias=-10.0)
    reference = random_embeddings(num_examples, 24, seed=seed + 100, scale=25.0, bias=-8.0)
    selection = joint_selection(
        learner, reference, batch_size=batch_size, num_chunks=num_chunks, key=seed, step=3
    )
    expected, _ = naive.paper_listing(
        naive.score_matrix(learner, reference),
        batch_size=batch_size,
        num_chunks=num_chunks,
        noise=noise_of(seed, 3, num_chunks, num_examples),
    )
    assert selection.indices.tolist() == expected.tolist()


WEIGHTS = {
    "learnability": (1.0, -1.0),
    "easy_reference": (0.0, -1.0),
    "hard_learner": (1.0, 0.0),
    WeightedScore(0.5, -2.0): (0.5, -2.0),
}


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_every_draw_is_a_top_k_of_the_oracles_keys(data):
    """For any sizes, models and dtypes, given our own earlier chunks, up to rounding."""
    num_examples = data.draw(st.integers(1, 80), label="B")
    batch_size = data.draw(st.integers(1, num_examples), label="b")
    num_chunks = data.draw(st.integers(1, batch_size), label="chunks")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    gain = data.draw(st.sampled_from([0.01, 1.0, 30.0]))
    score = data.draw(st.sampled_from(list(WEIGHTS)))
    loss = data.draw(st.sampled_from(["sigmoid", "softmax"]))
    seed = data.draw(st.integers(0, 10**6))
    models = [
        random_embeddings(
            num_examples,
            data.draw(st.integers(4, 40)),
            seed=seed + index,
            # At the ends losses underflow, or the smaller ones vanish beside the larger.
            scale=data.draw(st.sampled_from([1e-3, 1.0, 10.0, 115.0, 1e3])),
            bias=data.draw(st.floats(-16, 2) | st.sampled_from([-200.0, 100.0])),
        )
        for index in range(2)
    ]
    models = [replace(m, image=m.image.to(dtype), text=m.text.to(dtype)) for m in models]
    selection = joint_selection(
        *models, batch_size=batch_size, num_chunks=num_chunks, score=score, loss=loss,
        rule=DrawRule(gain=gain), key=seed, step=1,
    )  # fmt: skip
    selected = selection.indices.tolist()
    assert len(set(selected)) == batch_size and set(selected) <= set(range(num_examples))
    weights, (learner, reference) = WEIGHTS[score], models
    # The oracle scores learner minus reference; a missing one counts nothing.
    matrix = weights[0] * naive.score_matrix(learner, None)
    matrix -= weights[1] * naive.score_matrix(None, reference)
    noise = noise_of(seed, 1, num_chunks, num_examples)
    first = 0
    for chunk in range(num_chunks):
        size = batch_size // num_chunks + (chunk < batch_size % num_chunks)
        before, drawn = selected[:first], selected[first : first + size]
        if loss == "sigmoid":
            scores = matrix.diagonal() + matrix[before].sum(0) + matrix[:, before].sum(1)
        else:
            own = torch.tensor(naive.softmax_streaming_score(learner, None, before))
            other = torch.tensor(naive.softmax_streaming_score(None, reference, before))
            scores = weights[0] * own - weights[1] * other
        keys = gain * scores.double() + noise[chunk]
        keys[before] = -torch.inf
        tolerance = 1e-5 * (1 + gain * scores.abs().max().item())
        best = keys.topk(size).values
        torch.testing.assert_close(keys[drawn], best, rtol=0, atol=tolerance)
        first += size


def test_softmax_choices_follow_the_exact_marginal_when_asked():
    learner, reference = random_embeddings(30, seed=1, bias=0.0), random_embeddings(30, seed=2)
    selection = joint_selection(
        learner, reference, batch_size=12, num_chunks=4, loss="softmax", exact_marginal=True,
        key=5, step=0,
    )  # fmt: skip
    noise = noise_of(5, 0, 4, 30)
    selected: list[int] = []
    for chunk in range(4):
        scores = torch.tensor(naive.softmax_exact_marginal(learner, reference, selected))
        keys = scores.double() + noise[chunk]
        keys[selected] = -torch.inf
        selected += keys.topk(3).indices.tolist()
    assert selection.indices.tolist() == selected


def test_batches_come_up_with_the_probability_of_drawing_one_after_the_other():
    # 20 ordered pairs of 5, each with probability p_i p_j|i worked out from the whole matrix.
    # Chi-square with 19 degrees of freedom is above 65 with probability 6e-7.
    learner = random_embeddings(5, 4, seed=0, scale=2.0, bias=-1.0)
    reference = random_embeddings(5, 4, seed=1, scale=2.0, bias=0.0)
    num_draws = 2000
    counts = Counter(
        tuple(
            joint_selection(
                learner, reference, batch_size=2, num_chunks=2, key=7, step=step
            ).indices.tolist()
        )
        for step in range(num_draws)
    )
    scores = naive.score_matrix(learner, reference)
    first = scores.diagonal().softmax(0)
    statistic = 0.0
    for i, j in itertools.permutations(range(5), 2):
        given_i = scores.diagonal() + scores[i] + scores[:, i]
        given_i[i] = -torch.inf
        expected = num_draws * float(first[i] * given_i.softmax(0)[j])
        statistic += (counts[i, j] - expected) ** 2 / expected
    assert sum(counts.values()) == num_draws
    assert statistic < 65


def subset_score(scores, subset):
    chosen = list(subset)
    return scores[chosen][:, chosen].sum().item()


@pytest.mark.parametrize("seed", range(10))
def test_drawn_scores_add_up_to_the_score_of_the_batch_which_no_subset_beats_by_much(seed):
    learner = random_embeddings(9, 4, seed=seed, scale=5.0, bias=-3.0)
    reference = random_embeddings(9, 4, seed=seed + 50, scale=5.0, bias=-3.0)
    scores = naive.score_matrix(learner, reference)
    selection = joint_selection(
        learner, reference, batch_size=4, num_chunks=4, rule=GREEDY, key=0, step=0
    )
    found = subset_score(scores, selection.indices.tolist())
    # With one example per chunk, what each adds is counted once.
    assert selection.selected_score.item() * 4 == pytest.approx(found, rel=1e-5, abs=1e-5)
    every = [subset_score(scores, subset) for subset in itertools.combinations(range(9), 4)]
    assert found <= max(every) + 1e-5
    # Greedy is no optimum, but above nine tenths of all 126 batches here.
    assert found > sorted(every)[int(0.9 * len(every))] - 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_at_infinite_gain_every_chunk_is_the_best_without_noise(seed):
    models = random_embeddings(150, seed=seed), random_embeddings(150, seed=seed + 9, scale=20.0)
    selection = joint_selection(*models, batch_size=40, num_chunks=6, rule=GREEDY, key=seed, step=0)
    expected, _ = naive.paper_listing(
        naive.score_matrix(*models), batch_size=40, num_chunks=6, noise=torch.zeros(6, 150)
    )
    assert selection.indices.tolist() == expected.tolist()


def test_greedy_selection_finds_a_planted_batch_that_is_the_best_of_all():
    # Pairs among {1, 4, 6} are worth 60 both ways, and 4 has a slight lead alone.
    planted = {1, 4, 6}
    logits = torch.full((8, 8), -200.0)
    logits.fill_diagonal_(-1.0)
    for i, j in itertools.permutations(planted, 2):
        logits[i, j] = 60.0
    logits[4, 4] = -2.0
    learner = embeddings_with_logits(logits.tolist())
    scores = naive.score_matrix(learner, None)
    best = max(itertools.combinations(range(8), 3), key=lambda s: subset_score(scores, s))
    selected = select_jointly(
        learner, None, batch_size=3, num_chunks=3, score="hard_learner", gain=float("inf")
    )
    assert set(best) == planted == set(selected.tolist())


def test_joint_selection_scores_above_independent_and_uniform():
    # Mean score per example of the chosen batch, over 5 seeds; what theory promises of the rule.
    joint = independent = uniform = 0.0
    for seed in range(5):
        models = random_embeddings(400, seed=seed), random_embeddings(400, seed=seed, scale=20.0)
        scores = naive.score_matrix(*models)
        generator = torch.Generator().manual_seed(seed)
        arguments = {"batch_size": 80, "generator": generator}
        joint += subset_score(scores, select_jointly(*models, **arguments).tolist())
        independent += subset_score(scores, select_independently(*models, **arguments).tolist())
        uniform += subset_score(scores, range(80))
    assert joint > independent and joint > uniform


@pytest.mark.parametrize(
    "num_examples, batch_size, num_chunks",
    [(10_240, 2048, 16), (1000, 200, 16), (101, 33, 10), (5, 5, 5), (1, 1, 1)],
)
def test_sizes_are_exact_and_nothing_is_chosen_twice(num_examples, batch_size, num_chunks):
    models = random_embeddings(num_examples, 4, seed=0), random_embeddings(num_examples, 4, seed=1)
    selection = joint_selection(
        *models, batch_size=batch_size, num_chunks=num_chunks, key=0, step=0
    )
    assert selection.indices.shape == (batch_size,)
    assert selection.indices.dtype == torch.int64
    assert selection.indices.unique().numel() == batch_size
    assert selection.effective_support.shape == (num_chunks,)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_a_batch_as_large_as_the_super_batch_is_a_permutation(loss):
    models = random_embeddings(90, seed=0), random_embeddings(90, seed=1)
    selected = select_jointly(*models, batch_size=90, loss=loss)
    assert selected.sort().values.tolist() == list(range(90))


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_equal_models_leave_a_uniform_choice(loss):
    learner = random_embeddings(100, seed=0)
    selection = joint_selection(
        learner, learner, batch_size=40, num_chunks=4, loss=loss, key=1, step=1
    )
    assert selection.selected_score == 0 and selection.candidate_score == 0
    assert selection.effective_support.tolist() == pytest.approx([100, 90, 80, 70])
    # The noise alone decides.
    first = noise_of(1, 1, 1, 100)[0].topk(10).indices
    assert torch.equal(selection.indices[:10], first)


@pytest.mark.parametrize("scale, bias", [(1e4, -1e4), (1e4, 1e4), (1e-4, 0.0), (0.0, -300.0)])
@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_extreme_logits_neither_under_nor_overflow(scale, bias, loss):
    learner = random_embeddings(60, seed=0, scale=scale, bias=bias)
    reference = random_embeddings(60, seed=1, scale=scale, bias=bias)
    selection = joint_selection(
        learner, reference, batch_size=30, num_chunks=5, loss=loss, key=0, step=0
    )
    assert selection.is_finite and selection.selected_score.isfinite()
    assert selection.indices.unique().numel() == 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_computed_in_float32(dtype):
    models = [random_embeddings(200, seed=seed) for seed in (0, 1)]
    cast = [replace(m, image=m.image.to(dtype), text=m.text.to(dtype)) for m in models]
    back = [replace(m, image=m.image.float(), text=m.text.float()) for m in cast]
    selections = [
        joint_selection(*pair, batch_size=50, num_chunks=8, key=0, step=0).indices
        for pair in (cast, back)
    ]
    assert torch.equal(*selections)


def test_half_precision_reference_embeddings_hardly_change_the_choice():
    overlaps = []
    for seed in range(20):
        learner, reference = (random_embeddings(400, 32, seed=seed + i) for i in (0, 1000))
        half = replace(reference, image=reference.image.half(), text=reference.text.half())
        chosen = [
            set(
                joint_selection(
                    learner, model, batch_size=80, num_chunks=16, key=seed, step=0
                ).indices.tolist()
            )
            for model in (reference, half)
        ]
        overlaps.append(len(chosen[0] & chosen[1]) / 80)
    assert sum(overlaps) / len(overlaps) >= 0.99


def test_autocast_around_the_call_changes_nothing():
    models = random_embeddings(300, seed=0), random_embeddings(300, seed=1)
    plain = joint_selection(*models, batch_size=60, key=0, step=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = joint_selection(*models, batch_size=60, key=0, step=0)
    assert torch.equal(plain.indices, under.indices)
    assert torch.equal(plain.selected_score, under.selected_score)


def test_embeddings_with_gradients_or_from_inference_mode_are_welcome_and_stay_as_they_are():
    plain = random_embeddings(50, seed=0)
    trained = replace(
        plain,
        image=plain.image.clone().requires_grad_(),
        logit_scale=torch.tensor([10.0], requires_grad=True),
        logit_bias=torch.tensor(-10.0),
    )
    with torch.inference_mode():
        frozen = replace(plain, image=plain.image.clone(), text=plain.text.clone())
    copies = [(m, m.image.detach().clone(), m.text.clone()) for m in (trained, frozen)]
    expected = joint_selection(
        plain, random_embeddings(50, seed=1), batch_size=10, num_chunks=4, key=0, step=0
    )
    for model in (trained, frozen):
        selection = joint_selection(
            model, random_embeddings(50, seed=1), batch_size=10, num_chunks=4, key=0, step=0
        )
        assert torch.equal(selection.indices, expected.indices)
        assert not selection.selected_score.requires_grad
    for model, image, text in copies:
        assert torch.equal(model.image, image) and torch.equal(model.text, text)


def test_models_the_score_does_not_need_are_not_looked_at():
    models = random_embeddings(50, seed=0), random_embeddings(50, seed=1)
    broken = replace(models[0], image=torch.full((3, 1, 1), torch.nan))
    for score, offered, without in (
        ("easy_reference", (broken, models[1]), (None, models[1])),
        ("hard_learner", (models[0], broken), (models[0], None)),
    ):
        arguments = {"batch_size": 10, "num_chunks": 2, "score": score, "key": 0, "step": 0}
        a, b = joint_selection(*offered, **arguments), joint_selection(*without, **arguments)
        assert torch.equal(a.indices, b.indices)


def test_a_generator_names_the_choice_and_global_random_state_stays():
    models = random_embeddings(100, seed=0), random_embeddings(100, seed=1)
    before = torch.get_rng_state()
    chosen = [
        select_jointly(*models, batch_size=20, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    select_jointly(*models, batch_size=20)
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    assert torch.equal(torch.get_rng_state(), before)
