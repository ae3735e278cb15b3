"""A run keeps the models that its rule needs, knows their loss and device, and refuses the rest.

pytest tests/pipeline/test_models.py
"""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor, tokenize
from torch import nn

from jest_stream.config import (
    DEFAULT_IMAGE_KEY,
    DEFAULT_LIMITS,
    DEFAULT_TEXT_KEY,
    SelectionConfig,
    TargetSimilarity,
    ViewConfig,
)
from jest_stream.errors import ConfigError
from jest_stream.pipeline.models import Models, Reference, open_reference
from jest_stream.selection import WeightedScore

pytestmark = pytest.mark.usefixtures("no_leaks")

LEARNER, REFERENCE = TinyTwoTower(1), TinyTwoTower(2)
UNIFORM = SelectionConfig(method="uniform")
LEARNABILITY = SelectionConfig(score="learnability")
EASY_REFERENCE = SelectionConfig(score="easy_reference")
HARD_LEARNER = SelectionConfig(score="hard_learner")
TARGETS = (TargetSimilarity(targets=torch.eye(2, 16)),)


def own_score(learner_loss: torch.Tensor, reference_loss: torch.Tensor) -> torch.Tensor:
    return learner_loss - 0.5 * reference_loss


@pytest.mark.parametrize(
    ("rule", "with_reference", "needs_learner", "needs_reference"),
    [
        (LEARNABILITY, False, True, True),
        (EASY_REFERENCE, False, False, True),
        (HARD_LEARNER, False, True, False),
        (SelectionConfig(score=own_score), False, True, True),
        (SelectionConfig(score=WeightedScore(1, 0)), False, True, False),
        (SelectionConfig(score=WeightedScore(0, -1)), False, False, True),
        (UNIFORM, False, False, False),
        # The reference embeds for a term, or for the batch, without a part in the score.
        (SelectionConfig(score="hard_learner", terms=TARGETS), False, True, True),
        (HARD_LEARNER, True, True, True),
        (UNIFORM, True, False, True),
        (SelectionConfig(method="uniform", terms=TARGETS), False, False, False),
    ],
)
def test_a_rule_keeps_the_models_that_it_needs(
    rule: SelectionConfig, with_reference: bool, needs_learner: bool, needs_reference: bool
) -> None:
    models = Models(rule, LEARNER, REFERENCE, with_reference=with_reference)
    assert models.learner is (LEARNER if needs_learner else None)
    assert models.reference is (REFERENCE if needs_reference else None)
    assert models.trained is LEARNER, "the user trains it, whether or not the rule needs it"


@pytest.mark.parametrize(
    ("rule", "learner", "reference", "with_reference", "message"),
    [
        (LEARNABILITY, None, REFERENCE, False, "learner=None, but score='learnability' compares"),
        (LEARNABILITY, LEARNER, None, False, "reference=None, but score='learnability' compares"),
        (HARD_LEARNER, None, None, False, r"SelectionConfig\(score='easy_reference'\) needs none"),
        (EASY_REFERENCE, None, None, False, r"SelectionConfig\(score='hard_learner'\) needs none"),
        (SelectionConfig(score=own_score), None, REFERENCE, False, "but a score of your own comp"),
        (
            SelectionConfig(score="hard_learner", terms=TARGETS),
            *(LEARNER, None, False),
            "reference=None, but TargetSimilarity compares",
        ),
        (UNIFORM, None, None, True, "with_reference=True yields .*, but reference=None"),
    ],
)
def test_a_missing_model_is_an_error_that_names_it(
    rule: SelectionConfig,
    learner: nn.Module | None,
    reference: nn.Module | None,
    with_reference: bool,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        Models(rule, learner, reference, with_reference=with_reference)


def test_a_module_that_cannot_embed_is_refused_only_where_it_is_needed() -> None:
    not_a_tower: Any = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="the learner, a Linear, has no encode_image and encode"):
        Models(HARD_LEARNER, not_a_tower, None)
    with pytest.raises(ConfigError, match="the reference, a Linear, has no encode_image"):
        Models(LEARNABILITY, LEARNER, not_a_tower)
    Models(EASY_REFERENCE, not_a_tower, REFERENCE)
    Models(HARD_LEARNER, LEARNER, not_a_tower)


@pytest.mark.parametrize(
    ("score", "learner_has_bias", "reference_has_bias", "loss"),
    [
        ("learnability", True, True, "sigmoid"),
        ("learnability", True, False, "softmax"),
        ("learnability", False, True, "softmax"),
        ("learnability", False, False, "softmax"),
        # A model without a part in the score has none in the choice of its loss.
        ("hard_learner", True, False, "sigmoid"),
        ("hard_learner", False, True, "softmax"),
        ("easy_reference", False, True, "sigmoid"),
        ("easy_reference", True, False, "softmax"),
    ],
)
def test_the_loss_is_sigmoid_if_all_models_of_the_score_have_a_bias(
    score: str, learner_has_bias: bool, reference_has_bias: bool, loss: str
) -> None:
    learner, reference = (TinyTwoTower(has_bias=b) for b in (learner_has_bias, reference_has_bias))
    models = Models(SelectionConfig(score=score), learner, reference, with_reference=True)
    assert models.loss == loss


def test_a_loss_that_the_user_names_is_kept() -> None:
    rule = SelectionConfig(score="hard_learner", loss="softmax")
    assert Models(rule, LEARNER, None).loss == "softmax"


CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(
    ("learner", "reference", "given", "expected"),
    [
        (META, CPU, (None, None), (META, META)),
        (CPU, META, (None, None), (CPU, CPU)),
        (None, META, (None, None), (META, META)),
        (None, None, (None, None), (CPU, CPU)),
        (META, META, (CPU, None), (CPU, CPU)),
        (CPU, CPU, (None, META), (CPU, META)),
        (CPU, CPU, (META, CPU), (META, CPU)),
    ],
)
def test_batches_and_scoring_go_where_the_learner_is_unless_told(
    learner: torch.device | None,
    reference: torch.device | None,
    given: tuple[torch.device | None, torch.device | None],
    expected: tuple[torch.device, torch.device],
) -> None:
    """Even under a rule that needs neither: the loop trains there."""
    made = [
        None if device is None else TinyTwoTower().to(device) for device in (learner, reference)
    ]
    assert Models(UNIFORM, *made).devices(*given) == expected


def test_a_learner_moved_before_the_first_batch_is_found_where_it_is_then() -> None:
    learner = TinyTwoTower()
    models = Models(HARD_LEARNER, learner, None)
    assert models.devices(None, None) == (CPU, CPU)
    learner.to(META)
    assert models.devices(None, None) == (META, META)


def test_released_models_are_let_go_of() -> None:
    learner = TinyTwoTower()
    alive = weakref.ref(learner)
    models = Models(LEARNABILITY, learner, REFERENCE)
    models.release()
    del learner
    gc.collect()
    assert alive() is None
    assert [models.learner, models.reference, models.trained] == [None] * 3


def views(**given: Any) -> ViewConfig:
    usual: dict[str, Any] = dict.fromkeys(
        ("transform", "tokenizer", "train_transform", "reference_transform", "reference_tokenizer")
    )
    usual |= {"image_key": DEFAULT_IMAGE_KEY, "text_key": DEFAULT_TEXT_KEY}
    usual |= {"train_view_from": "auto", "reduced_decoding": "auto", "limits": DEFAULT_LIMITS}
    return ViewConfig(**{**usual, **given})


@pytest.mark.parametrize("reference", [REFERENCE, None])
def test_a_module_is_taken_as_it_is_with_the_views_made_for_it(
    reference: nn.Module | None,
) -> None:
    given = views(reference_transform=to_tensor, reference_tokenizer=tokenize)
    with ExitStack() as opened:
        found = open_reference(reference, views=given, storage=None, opened=opened)
        shared = open_reference(reference, views=views(), storage=None, opened=opened)
    assert found == Reference(reference, to_tensor, tokenize)
    assert shared == Reference(reference, None, None)


def test_a_name_that_is_no_model_and_no_cache_is_an_error_that_tells_how_to_build_one(
    tmp_path: Path,
) -> None:
    missing = tmp_path / "ViT-B-23"
    with ExitStack() as opened:
        with pytest.raises(ConfigError, match="ViT-B-23' is no folder of a reference cache, no mo"):
            open_reference(missing, views=views(), storage=None, opened=opened)
