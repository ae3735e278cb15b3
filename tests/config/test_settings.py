"""The settings are frozen, refuse bad values by name, and get each argument under its own name.

pytest tests/config/test_settings.py
"""

from __future__ import annotations

import ast
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, flipped, to_tensor, tokenize
from support.shards import write_shards

from jest_stream import JESTDataset
from jest_stream.config import (
    SCORE_NAMES,
    BatchConfig,
    Layout,
    Limits,
    Quota,
    RunSettings,
    ScoringConfig,
    SelectionConfig,
    Sizes,
    StorageConfig,
    StreamConfig,
    TargetSimilarity,
    Term,
    ViewConfig,
)
from jest_stream.errors import ConfigError
from jest_stream.selection import scores

pytestmark = pytest.mark.usefixtures("no_leaks")

PACKAGE = Path(__file__).parents[2] / "jest_stream"
CONFIGS = [
    *(BatchConfig, Layout, Limits, Quota, RunSettings, ScoringConfig, SelectionConfig, Sizes),
    *(StorageConfig, StreamConfig, TargetSimilarity, Term, ViewConfig),
]

STREAM: dict[str, Any] = {
    "refresh_every": 2,
    "lookahead": 3,
    "steps_per_epoch": 5,
    "repeat": True,
    "seed": 7,
    "num_workers": 11,
    "lanes": 2,
    "on_bad_example": "skip",
    "on_bad_shard": "raise",
    "max_bad_fraction": 0.13,
    "timeout_s": 17.0,
    "training_flops": 19e9,
}
BATCH: dict[str, Any] = {"as_dict": True, "with_reference": True, "score_view_fraction": 0.5}
VIEWS: dict[str, Any] = {
    "image_key": "jpg",
    "text_key": "txt",
    "transform": to_tensor,
    "tokenizer": tokenize,
    "train_transform": flipped,
    "train_view_from": "encoded",
    "reduced_decoding": False,
    "reference_transform": lambda image: to_tensor(image),
    "reference_tokenizer": lambda text: tokenize(text),
    "limits": Limits(max_pixels=10_000),
}
ONE_PASS: dict[str, Any] = {"repeat": False, "steps_per_epoch": None, "on_bad_shard": "skip"}


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_are_frozen_named_and_closed(config: Any) -> None:
    made = object.__new__(config)
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(config)[0].name, None)
    with pytest.raises(TypeError, match="positional"):
        config(1)
    assert not hasattr(made, "__dict__")  # slots: a misspelt field is an error


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("refresh_every", 0, "refresh_every must be an integer of at least 1, got 0"),
        ("refresh_every", None, "refresh_every must be an integer of at least 1, got None"),
        ("lookahead", -1, "lookahead must be an integer of at least 0, got -1"),
        ("steps_per_epoch", 0, "steps_per_epoch must be an integer of at least 1, got 0"),
        ("repeat", 1, "repeat must be True or False, got 1"),
        ("seed", -1, "seed must be an integer of at least 0, got -1"),
        ("seed", True, "seed must be an integer of at least 0, got True"),
        ("num_workers", 1.5, "num_workers must be an integer of at least 0, got 1.5"),
        ("lanes", 0, "lanes must be an integer of at least 1, got 0"),
        ("on_bad_example", "no", "on_bad_example must be one of 'raise', 'skip', got 'no'"),
        ("on_bad_shard", None, "on_bad_shard must be one of 'raise', 'skip', got None"),
        ("max_bad_fraction", 1.1, r"max_bad_fraction must be a share in \[0, 1\], got 1.1"),
        ("max_bad_fraction", float("nan"), "max_bad_fraction must be a share"),
        ("timeout_s", 0, "timeout_s must be above 0 seconds, got 0"),
        ("timeout_s", "9", "timeout_s must be a number, got '9'"),
        ("training_flops", 0, "training_flops must be above 0"),
        ("training_flops", float("inf"), "training_flops must be above 0"),
        ("repeat", False, "steps_per_epoch=5 promises that many batches"),
    ],
)
def test_a_stream_setting_that_cannot_work_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StreamConfig(**{**STREAM, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("as_dict", 1, "as_dict must be True or False, got 1"),
        ("with_reference", None, "with_reference must be True or False, got None"),
        ("as_dict", False, r"with_reference=True adds an entry.*Pass as_dict=True"),
        ("score_view_fraction", "half", "score_view_fraction must be a number, got 'half'"),
        ("score_view_fraction", float("inf"), "score_view_fraction must be finite, got inf"),
    ],
)
def test_a_form_of_batches_that_cannot_work_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchConfig(**{**BATCH, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, 3, f"{name} must be a function of one image or text, or None, got 3")
          for name in ("transform", "tokenizer", "train_transform", "reference_transform",
                       "reference_tokenizer")),
        ("image_key", "", "image_key must be the name of a member, .* got ''"),
        ("text_key", 3, "text_key must be the name of a member, .* got 3"),
        ("train_view_from", "raw", "train_view_from must be one of 'auto', .* got 'raw'"),
        ("reduced_decoding", "no", "reduced_decoding must be one of 'auto', .* got 'no'"),
        ("limits", 3, "limits must be a Limits object or None, got 3"),
    ],
)  # fmt: skip
def test_a_view_that_cannot_be_made_is_named(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViewConfig(**{**VIEWS, name: value})


def test_integers_of_other_libraries_become_plain_ones() -> None:
    limits = Limits(max_pixels=torch.tensor(9))  # type: ignore[arg-type]
    storage = StorageConfig(cache_bytes=torch.tensor(9))  # type: ignore[arg-type]
    assert type(limits.max_pixels) is type(storage.cache_bytes) is int


@pytest.mark.parametrize("changed", [{}, ONE_PASS], ids=["steps", "passes"])
def test_every_argument_of_the_dataset_becomes_the_setting_of_its_name(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    options = {**STREAM, **BATCH, **VIEWS, **changed}
    selection, scoring = SelectionConfig(num_chunks=2), ScoringConfig(micro_batch_size=5)
    storage = StorageConfig(cache_bytes=9)
    with JESTDataset(
        write_shards(tmp_path, num_shards=2, examples_per_shard=2),
        learner=TinyTwoTower(1),
        reference=TinyTwoTower(2),
        batch_size=4,
        super_batch_size=8,
        selection=selection,
        scoring=scoring,
        device="cpu",
        scoring_device="meta",
        storage=storage,
        **options,
    ) as dataset:
        settings = dataset._settings
    for config in (settings.stream, settings.batch, settings.views):
        for field in fields(config):
            assert getattr(config, field.name) == options.pop(field.name), field.name
    assert not options
    assert settings.selection is selection and settings.scoring is scoring
    assert (settings.sizes.batch_size, settings.sizes.changes) == (4, ((0, 8),))
    assert settings.device == torch.device("cpu")
    assert settings.scoring_device == torch.device("meta")
    assert settings.storage is storage


def test_each_name_of_a_score_is_that_of_its_function() -> None:
    for name in SCORE_NAMES:
        assert scores.resolve_score(name) is getattr(scores, name)


# In these the keywords are data, not the user's arguments: columns of a tensor file, fields of a
# manifest, a processor's outputs, or the options that users give for a library of others.
KEYWORDS_ARE_DATA = {"demo", "metrics", "reference_cache", "scoring", "sources", "storage", "views"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_arguments_are_handed_on_by_name(path: Path) -> None:
    """Types, editors and readers lose track of an argument in `locals()` and in `f(**options)`."""
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        where = f"{path.relative_to(PACKAGE)}:{call.lineno}"
        assert ast.unparse(call.func) not in ("locals", "globals", "vars") or call.args, where
        unnamed = [keyword.value for keyword in call.keywords if keyword.arg is None]
        if path.relative_to(PACKAGE).parts[0] in KEYWORDS_ARE_DATA:
            continue
        # A Selection is a record of tensors, which checkpoints and transfers take apart by name.
        assert not unnamed or ast.unparse(call.func) == "Selection", f"{where} {ast.unparse(call)}"
