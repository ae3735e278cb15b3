"""Scores say which models they need and what a pair is worth; one's own functions are checked.

pytest tests/selection/test_scores.py
"""

from __future__ import annotations

import pytest
import torch
from support.selection_inputs import random_embeddings

import jest_stream.selection as selection
from jest_stream.errors import ConfigError
from jest_stream.selection.joint import select_jointly
from jest_stream.selection.scores import (
    WeightedScore,
    easy_reference,
    hard_learner,
    learnability,
    needs,
)


def test_a_table_worked_out_by_hand():
    learner, reference = torch.tensor([[5.0, 1.0]]), torch.tensor([[2.0, 4.0]])
    assert learnability(learner, reference).tolist() == [[3.0, -3.0]]
    assert easy_reference(learner, reference).tolist() == [[-2.0, -4.0]]
    assert hard_learner(learner, reference).tolist() == [[5.0, 1.0]]
    assert WeightedScore(2, 0.5)(learner, reference).tolist() == [[11.0, 4.0]]


@pytest.mark.parametrize("score, expected", [
    ("learnability", (True, True)),
    ("easy_reference", (False, True)),
    ("hard_learner", (True, False)),
    (WeightedScore(0.0, 3.0), (False, True)),
    (lambda a, b: a, (True, True)),  # the inputs that a function looks at cannot be known
])  # fmt: skip
def test_a_score_says_which_models_it_needs(score, expected):
    assert needs(score) == expected


def test_functions_are_called_on_pair_losses_of_both_models_in_nats():
    seen = []

    def watched(learner_loss, reference_loss):
        seen.append((learner_loss.shape, reference_loss.shape, learner_loss.min()))
        return learner_loss - reference_loss

    models = random_embeddings(40, seed=0), random_embeddings(40, seed=1)
    generator = [torch.Generator().manual_seed(0) for _ in range(2)]
    arguments = {"batch_size": 10, "num_chunks": 4}
    own = select_jointly(*models, score=watched, generator=generator[0], **arguments)
    named = select_jointly(*models, generator=generator[1], **arguments)
    assert own.tolist() == named.tolist()
    assert all(a == b and len(a) == 2 and least >= 0 for a, b, least in seen)


@pytest.mark.parametrize("score, got", [
    (lambda a, b: (a - b).sum(), r"got shape \[\]"),
    (lambda a, b: a.mean(0), r"got shape \[1\]"),
    (lambda a, b: 1.0, "got float"),
    (lambda a, b: None, "got NoneType"),
])  # fmt: skip
def test_a_function_that_returns_another_shape_is_an_error(score, got):
    models = random_embeddings(40, seed=0), random_embeddings(40, seed=1)
    with pytest.raises(ConfigError, match=got + r".*must treat each pair alone"):
        select_jointly(*models, batch_size=10, num_chunks=4, score=score)


@pytest.mark.parametrize("name", ["learnable", "", None])
def test_unknown_names_are_an_error_that_lists_the_known(name):
    with pytest.raises(ConfigError, match=f"'hard_learner' or a function .* got {name!r}"):
        needs(name)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_weights_that_score_nothing_are_an_error(weights):
    with pytest.raises(ConfigError, match="finite weights that are not both 0"):
        WeightedScore(*weights)


def test_public_names_are_sorted_and_exist():
    assert selection.__all__ == sorted(selection.__all__)
    assert all(hasattr(selection, name) for name in selection.__all__)
