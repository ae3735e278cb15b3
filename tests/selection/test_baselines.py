"""The baselines score each example alone, in both meanings of that, or not at all.

pytest tests/selection/test_baselines.py
"""

from __future__ import annotations

import naive
import pytest
import torch
from support.selection_inputs import noise_of, random_embeddings

from jest_stream.errors import ConfigError
from jest_stream.selection.baselines import (
    independent_selection,
    select_independently,
    select_uniformly,
    uniform_selection,
)
from jest_stream.selection.joint import joint_selection, select_jointly
from jest_stream.selection.scores import WeightedScore

SEEDS = range(5)


def models(seed):
    return random_embeddings(120, seed=seed), random_embeddings(120, seed=seed + 100, scale=20.0)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize("seed", SEEDS)
def test_independent_selection_is_joint_selection_with_one_chunk(seed, loss):
    arguments = {"batch_size": 30, "loss": loss, "key": seed, "step": 2}
    independent = independent_selection(*models(seed), **arguments)
    joint = joint_selection(*models(seed), num_chunks=1, **arguments)
    assert torch.equal(independent.indices, joint.indices)
    assert torch.equal(independent.selected_score, joint.selected_score)


def test_calls_of_select_jointly_fit_select_independently():
    arguments = {"batch_size": 30, "num_chunks": 16, "num_sweeps": 2, "gain": 2.0}
    first, second = (torch.Generator().manual_seed(0) for _ in range(2))
    independent = select_independently(*models(0), **arguments, generator=first)
    joint = select_jointly(*models(0), **{**arguments, "num_chunks": 1}, generator=second)
    assert torch.equal(independent, joint)


@pytest.mark.parametrize("score", ["learnability", WeightedScore(2, -1), lambda a, b: a * b])
@pytest.mark.parametrize("seed", SEEDS)
def test_against_the_super_batch_each_example_has_all_its_pairs(seed, score):
    learner, reference = models(seed)
    selection = independent_selection(
        learner, reference, batch_size=30, score=score, negatives="super_batch", key=seed, step=0
    )
    function = (lambda a, b: a - b) if score == "learnability" else score
    matrix = function(naive.sigmoid_pair_losses(learner), naive.sigmoid_pair_losses(reference))
    scores = matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    expected = (scores + noise_of(seed, 0, 1, 120)[0]).topk(30).indices
    assert selection.indices.tolist() == expected.tolist()
    torch.testing.assert_close(
        selection.candidate_score.double(), scores.mean(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_against_the_super_batch_the_softmax_loss_is_that_of_the_whole_batch(seed):
    learner, reference = models(seed)
    selection = independent_selection(
        learner, reference, batch_size=30, loss="softmax", negatives="super_batch", key=0, step=0
    )
    everything = list(range(120))
    total = naive.softmax_batch_loss(learner, everything)
    total -= naive.softmax_batch_loss(reference, everything)
    assert selection.candidate_score.item() * 120 == pytest.approx(total, rel=1e-4)


def test_uniform_selection_draws_every_example_alike():
    # Each of 100 is drawn with probability 0.3: over 2000 draws the count is within 6.5
    # deviations of 600, all of them but with probability 1e-8.
    counts = torch.zeros(100)
    for step in range(2000):
        selected = uniform_selection(100, batch_size=30, key=0, step=step).indices
        assert selected.unique().numel() == 30
        counts[selected] += 1
    assert (counts - 600).abs().max() < 6.5 * (2000 * 0.3 * 0.7) ** 0.5


def test_uniform_selection_has_no_scores():
    selection = uniform_selection(10, batch_size=4, key=0, step=0)
    assert selection.selected_score.isnan() and selection.candidate_score.isnan()
    assert selection.effective_support.tolist() == [10.0]
    assert selection.is_finite


def test_a_generator_names_the_choice_and_global_random_state_stays():
    before = torch.get_rng_state()
    chosen = [
        select_uniformly(50, batch_size=20, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    select_uniformly(50, batch_size=20)
    select_independently(*models(0), batch_size=20)
    assert torch.equal(chosen[0], chosen[1]) and not torch.equal(chosen[0], chosen[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_all_of_the_candidates_are_a_permutation():
    assert select_uniformly(30, batch_size=30).sort().values.tolist() == list(range(30))
    selected = select_independently(*models(0), batch_size=120, negatives="super_batch")
    assert selected.sort().values.tolist() == list(range(120))


def test_sizes_and_meanings_that_do_not_exist_are_errors():
    with pytest.raises(ConfigError, match="batch_size=31 is above the number of candidates, 30"):
        select_uniformly(30, batch_size=31)
    with pytest.raises(ConfigError, match="batch_size must be an integer of at least 1, got 0"):
        select_uniformly(30, batch_size=0)
    with pytest.raises(ConfigError, match="must be 'none' or 'super_batch', got 'all'"):
        select_independently(*models(0), batch_size=5, negatives="all")
    with pytest.raises(ConfigError, match="num_chunks must be an integer of at least 1, got 0"):
        select_independently(*models(0), batch_size=5, num_chunks=0)
