"""Running scores equal those worked out from the whole `[B, B]` matrix, whatever the tiles.

pytest tests/selection/test_conditional_scores.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import naive
import pytest
import torch
from support.selection_inputs import embeddings_with_logits, random_embeddings

from jest_stream.selection import losses
from jest_stream.selection.checks import check_candidates
from jest_stream.selection.conditional import (
    ExactSoftmaxScores,
    OwnSigmoidScores,
    SigmoidScores,
    SoftmaxScores,
    conditional_scores,
    take,
)
from jest_stream.selection.scores import WeightedScore, easy_reference, hard_learner, learnability

CHUNKS = [[3, 5, 7], [20], [0, 1, 39, 38, 11]]


def float32(embeddings):
    return replace(embeddings, image=embeddings.image.float(), text=embeddings.text.float())


def condition(conditional, chunk):
    conditional.condition_on(take(conditional.models, torch.tensor(chunk)))


def worst_error(conditional, oracle, chosen):
    """The largest difference over candidates that are not yet chosen, relative to the largest."""
    expected = torch.as_tensor(oracle)
    left = [k for k in range(len(expected)) if k not in chosen]
    difference = (conditional.scores() - expected)[left].abs().max()
    return float(difference / expected[left].abs().max().clamp_min(1e-30))


def test_a_table_worked_out_by_hand():
    #                             txt0   txt1   txt2
    learner = embeddings_with_logits([
        [0.0, 30.0, -90.0],
        [-90.0, -20.0, 10.0],
        [50.0, -90.0, 40.0]])  # fmt: skip
    # Losses: softplus(-x) on the diagonal, softplus(x) off it; softplus(0) = ln 2.
    #   [ln 2, 30,  0]
    #   [0,    20, 10]
    #   [50,    0,  0]
    conditional = conditional_scores(
        check_candidates(learner, None, score=hard_learner, loss="sigmoid")
    )
    torch.testing.assert_close(conditional.scores(), torch.tensor([math.log(2), 20.0, 0.0]))
    condition(conditional, [1])
    # Example 0 gains its pairs with 1: 30 + 0. Example 2: 0 + 10.
    expected = torch.tensor([math.log(2) + 30, 10.0])
    torch.testing.assert_close(conditional.scores()[[0, 2]], expected, atol=1e-4, rtol=0)
    condition(conditional, [0])
    # Example 2 gains its pairs with 0: 50 + 0.
    assert conditional.scores()[2].item() == pytest.approx(60, abs=1e-4)


def test_a_softmax_table_worked_out_by_hand():
    learner = embeddings_with_logits([
        [3.0, 1.0, 4.0],
        [1.0, 5.0, 9.0],
        [2.0, 6.0, 5.0]])  # fmt: skip
    conditional = conditional_scores(
        check_candidates(learner, None, score=hard_learner, loss="softmax")
    )
    torch.testing.assert_close(conditional.scores(), torch.tensor([-3.0, -5.0, -5.0]))
    condition(conditional, [1])
    # One chosen: the log-sum-exps are the logits themselves. Example 0: (1 + 1) / 2 - 3.
    expected = torch.tensor([-2.0, (6 + 9) / 2 - 5])
    torch.testing.assert_close(conditional.scores()[[0, 2]], expected, atol=1e-5, rtol=0)
    condition(conditional, [0])
    rows, columns = math.log(math.exp(2) + math.exp(6)), math.log(math.exp(4) + math.exp(9))
    assert conditional.scores()[2].item() == pytest.approx((rows + columns) / 2 - 5, abs=1e-5)


def test_an_exact_marginal_worked_out_by_hand():
    learner = embeddings_with_logits([[3.0, 1.0], [2.0, 5.0]])
    conditional = ExactSoftmaxScores([learner], [1.0])
    assert conditional.scores().tolist() == [0.0, 0.0]  # a batch of one has no loss
    condition(conditional, [0])
    # The loss of {0, 1}: of images log(1 + e^-2) + log(1 + e^-3), of texts log(1 + e^-1) +
    # log(1 + e^-4), and half of all that.
    expected = sum(math.log1p(math.exp(-gap)) for gap in (2, 3, 1, 4)) / 2
    assert conditional.scores()[1].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bias", [0.0, -10.0, 5.0])
@pytest.mark.parametrize("scale", [1.0, 10.0, 115.0])
@pytest.mark.parametrize("score", [learnability, easy_reference, hard_learner])
def test_sigmoid_scores_equal_the_matrix(score, scale, bias):
    learner = random_embeddings(40, 12, seed=1, scale=scale, bias=bias)
    reference = random_embeddings(40, 7, seed=2, scale=30.0, bias=bias - 3)
    conditional = conditional_scores(
        check_candidates(learner, reference, score=score, loss="sigmoid")
    )
    matrix = naive.score_matrix(
        learner if score.learner_weight else None, reference if score.reference_weight else None
    )
    chosen: list[int] = []
    for chunk in CHUNKS:
        oracle = matrix.diagonal() + matrix[chosen].sum(0) + matrix[:, chosen].sum(1)
        assert worst_error(conditional, oracle, chosen) < 1e-6
        condition(conditional, chunk)
        chosen += chunk


@pytest.mark.parametrize("kind, oracle", [
    (SoftmaxScores, naive.softmax_streaming_score),
    (ExactSoftmaxScores, naive.softmax_exact_marginal),
])  # fmt: skip
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_softmax_scores_equal_the_loops(kind, oracle, scale):
    # The bias must not matter.
    learner = random_embeddings(40, 12, seed=1, scale=scale, bias=-3.0)
    reference = random_embeddings(40, 7, seed=2, scale=30.0, bias=0.0)
    conditional = kind([learner, reference], [1.0, -1.0])
    chosen: list[int] = []
    for chunk in CHUNKS:
        assert worst_error(conditional, oracle(learner, reference, chosen), chosen) < 2e-6
        condition(conditional, chunk)
        chosen += chunk


def test_weights_and_functions_score_as_the_matrix_does():
    learner, reference = random_embeddings(40, seed=1), random_embeddings(40, seed=2, scale=20.0)
    own, other = (naive.sigmoid_pair_losses(model) for model in (learner, reference))
    cases = [
        (WeightedScore(0.5, -2.0), 0.5 * own - 2 * other),
        (lambda a, b: 0.5 * a - 2 * b, 0.5 * own - 2 * other),
        (lambda a, b: (a - b).clamp_min(-0.1) * a, (own - other).clamp_min(-0.1) * own),
    ]
    for score, matrix in cases:
        conditional = conditional_scores(
            check_candidates(learner, reference, score=score, loss="sigmoid")
        )
        chosen: list[int] = []
        for chunk in CHUNKS:
            oracle = matrix.diagonal() + matrix[chosen].sum(0) + matrix[:, chosen].sum(1)
            assert worst_error(conditional, oracle, chosen) < 1e-6
            condition(conditional, chunk)
            chosen += chunk


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_learner_equal_to_reference_scores_exactly_zero(loss):
    # Not almost: differences are taken tile by tile, before anything is summed up.
    learner = random_embeddings(500, 64, seed=0, scale=80.0)
    reference = replace(learner, image=learner.image.clone(), text=learner.text.clone())
    conditional = conditional_scores(
        check_candidates(learner, reference, score=learnability, loss=loss)
    )
    for chunk in torch.arange(120).split(50):
        assert not conditional.scores().any()
        conditional.condition_on(take(conditional.models, chunk))
    assert not conditional.scores().any()


@pytest.mark.parametrize("kind", [
    lambda models: SigmoidScores(models, [1.0, -1.0]),
    lambda models: SoftmaxScores(models, [1.0, -1.0]),
    lambda models: ExactSoftmaxScores(models, [1.0, -1.0]),
    lambda models: OwnSigmoidScores(models, lambda a, b: (a - b) * a),
])  # fmt: skip
@pytest.mark.parametrize("columns, size", [(1, 1), (3, 7), (4, 10_000)])
def test_scores_do_not_depend_on_the_tiles(kind, columns, size, monkeypatch):
    models = random_embeddings(61, seed=1), random_embeddings(61, seed=2)
    chunks = [list(range(11)), [30, 60]]
    whole = kind(models)
    for chunk in chunks:
        condition(whole, chunk)
    monkeypatch.setattr(losses, "_TILE_COLUMNS", columns)
    monkeypatch.setattr(losses, "_tile_size", lambda device: size)
    tiled = kind(models)
    for chunk in chunks:
        condition(tiled, chunk)
    left = [k for k in range(61) if k not in chunks[0] + chunks[1]]
    torch.testing.assert_close(tiled.scores()[left], whole.scores()[left], rtol=1e-6, atol=1e-5)


def test_a_part_of_the_candidates_scores_as_it_does_among_all():
    models = random_embeddings(60, seed=1), random_embeddings(60, seed=2)
    chunk = torch.tensor([3, 40, 59, 2])
    for kind in (SigmoidScores, SoftmaxScores, ExactSoftmaxScores):
        whole = kind(models, [1.0, -1.0])
        part = kind(take(models, torch.arange(10, 40)), [1.0, -1.0])
        for conditional in (whole, part):
            conditional.condition_on(take(models, chunk))
            conditional.condition_on(take(models, chunk + -1))
        torch.testing.assert_close(part.scores()[:20], whole.scores()[10:30], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("num_columns", [1, 2, 3, 5, 63, 64, 65, 512])
@pytest.mark.parametrize("x", [-200.0, -100.0, -88.0, -40.0, -16.0, -1.0, 0.0, 1.0, 16.0, 300.0])
def test_sums_of_losses_keep_their_digits_at_any_logit(x, num_columns):
    """1 + e^-16 is 6 % off in float32; softplus(300) would overflow an exponential."""
    logits = torch.full((4, num_columns), x, dtype=torch.float64)
    logits += torch.linspace(0, 0.5, num_columns, dtype=torch.float64)
    in_ln2 = (logits / losses.LN2).float()
    sums = losses.negative_loss_sums(in_ln2.clone(), torch.empty_like(in_ln2))
    # The rounding of the logit itself, 3e-8 of it, is not the function's.
    exact = torch.nn.functional.softplus(in_ln2.double() * losses.LN2, threshold=1000).sum(1)
    # Below e^-87 a float32 loses digits, and below e^-103 everything.
    torch.testing.assert_close(sums.double(), exact, rtol=2e-6, atol=num_columns * 2e-38)


def test_running_log_sum_exp_survives_any_logits():
    generator = torch.Generator().manual_seed(0)
    tiles = [
        torch.randn(30, 5, generator=generator) * spread + offset
        for spread, offset in ((1, 0), (300, 0), (1, -500), (1, 800), (300, 100))
    ]
    total = torch.full((30,), -torch.inf)
    for tile in tiles:
        losses.add_exponentials(total, tile / losses.LN2)
    expected = torch.cat(tiles, dim=1).double().logsumexp(1)
    torch.testing.assert_close(total.double() * losses.LN2, expected, rtol=1e-6, atol=0)


def test_tiles_cover_every_pair_once_and_fit_their_budget(monkeypatch):
    monkeypatch.setattr(losses, "_TILE_COLUMNS", 4)
    monkeypatch.setattr(losses, "_tile_size", lambda device: 20)
    models = [float32(random_embeddings(23, seed=seed, scale=3.0)) for seed in (1, 2)]
    chosen = take(models, torch.arange(9))
    found = torch.zeros(2, 2, 23, 9)
    for tile in losses.logit_tiles(models, chosen, with_bias=True):
        assert tile.logits.numel() <= 20
        found[tile.model, tile.side, tile.rows, tile.columns] += tile.logits * losses.LN2
    for index, model in enumerate(models):
        matrix = naive.logits(model, torch.float32)
        torch.testing.assert_close(found[index, 0], matrix[:, :9])
        torch.testing.assert_close(found[index, 1], matrix[:9].T)
