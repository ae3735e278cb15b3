"""Bad input raises an error that names the rule, the value and the fix; or is skipped and counted.

pytest tests/test_bad_input.py
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor
from support.models import tiny_dataset as jest
from support.shards import make_example, members, write_shards, write_tar
from torch import nn

from jest_stream import JESTDataset, ScoringConfig, SelectionConfig, TarSource
from jest_stream.errors import (
    BadExampleError,
    BadExampleLimitError,
    ConfigError,
    NonFiniteError,
    ResumeMismatchError,
    ShardError,
    ShardUnavailableError,
    UnsafeDataError,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

SHARDS = {"num_shards": 2, "examples_per_shard": 16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_ratio": 1.0}, r"filter_ratio must be in \[0, 1\), got 1.0"),
        ({"filter_ratio": -0.1}, r"filter_ratio must be in \[0, 1\), got -0.1"),
        ({"filter_ratio": float("nan")}, "filter_ratio must be in"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
        ({"batch_size": "4"}, "batch_size must be an integer of at least 1, got '4'"),
        ({"filter_ratio": "0.8"}, "filter_ratio must be a number, got '0.8'"),
        ({"filter_ratio": {0: None}}, "filter_ratio must be a number, got None"),
        ({"timeout_s": None}, "timeout_s must be a number, got None"),
        ({"transform": 3}, "transform must be a function of one image or text, or None, got 3"),
        ({"reference_tokenizer": "x"}, "reference_tokenizer must be a function"),
        ({"train_transform": 3}, "train_transform must be a function"),
        ({"image_key": None}, "image_key must be the name of a member, .* got None"),
        ({"text_key": ""}, "text_key must be the name of a member, .* got ''"),
        ({"device": "gpu"}, "device must be a device such as 'cuda:0' or 'cpu', got 'gpu'"),
        ({"scoring_device": 1.5}, "scoring_device must be a device such as"),
        ({"repeat": "no"}, "repeat must be True or False, got 'no'"),
        ({"as_dict": None}, "as_dict must be True or False, got None"),
        ({"max_bad_fraction": 2}, r"max_bad_fraction must be a share in \[0, 1\], got 2"),
        ({"on_bad_shard": "ignore"}, "on_bad_shard must be one of 'raise', 'skip'"),
        ({"limits": 3}, "limits must be a Limits object or None, got 3"),
        ({"super_batch_size": 3}, "super_batch_size=3 is below batch_size=4"),
        ({"refresh_every": 0}, "refresh_every must be an integer of at least 1"),
        ({"lookahead": -1}, "lookahead must be an integer of at least 0"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"timeout_s": 0}, "timeout_s must be above 0"),
        ({"on_bad_example": "ignore"}, "on_bad_example must be one of 'raise', 'skip'"),
        ({"steps_per_epoch": 3, "repeat": False}, "Pass one of the two"),
        ({"reference": None}, "reference=None, but score='learnability' compares pairs"),
        ({"learner": None}, "learner=None, but score='learnability' compares pairs"),
        ({"learner": nn.Linear(2, 2)}, "has no encode_image and encode_text"),
        ({"reference": nn.Linear(2, 2)}, "the reference, a Linear, has no encode_image"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_construction(
    own_shards: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        jest(own_shards, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "selection.method must be one of 'joint'"),
        ({"score": "loss"}, "selection.score must be one of 'learnability'"),
        ({"loss": "hinge"}, "selection.loss must be one of 'auto'"),
        ({"num_chunks": 0}, "selection.num_chunks must be an integer of at least 1"),
        ({"gain": 0.0}, "selection.gain must be above 0, got 0.0"),
        ({"gain": float("nan")}, "selection.gain must be above 0"),
        ({"gain": None}, "selection.gain must be a number, got None"),
        ({"uniform_fraction": "0.1"}, "selection.uniform_fraction must be a number, got '0.1'"),
        ({"stop_step": 2.5}, "selection.stop_step must be an integer"),
    ],
)
def test_selection_rules_that_cannot_work_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 0}, "scoring.micro_batch_size must be an integer of at least 1"),
        ({"autocast_dtype": torch.int8}, "scoring.autocast_dtype must be torch.bfloat16"),
    ],
)
def test_ways_of_scoring_that_cannot_work_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ScoringConfig(**options)


def test_integers_of_numpy_and_torch_are_integers(own_shards: list[str]) -> None:
    rule = SelectionConfig(num_chunks=np.int64(2))  # type: ignore[arg-type]
    dataset = jest(
        own_shards,
        batch_size=np.int64(4),
        super_batch_size=torch.tensor(8),
        lookahead=np.int32(1),
        num_workers=np.int8(0),
        steps_per_epoch=np.uint8(2),
        seed=np.int64(5),
        selection=rule,
        scoring=ScoringConfig(micro_batch_size=torch.tensor(64)),  # type: ignore[arg-type]
    )
    assert len(list(dataset)) == 2
    state = dataset.state_dict()
    dataset.close()
    assert type(state["settings"]["batch_size"]) is int and type(state["settings"]["seed"]) is int
    json.dumps(state)


def test_a_missing_shard_is_named_before_training(own_shards: list[str]) -> None:
    missing = own_shards[0].replace("00000", "00009")
    with pytest.raises(ShardUnavailableError, match="00009.tar") as caught:
        jest([*own_shards, missing])
    assert caught.value.shard.endswith("00009.tar")


def test_a_shard_that_vanishes_during_training_is_named(own_shards: list[str]) -> None:
    iterator = iter(jest(own_shards, lookahead=0))
    next(iterator)
    iterator.close()
    Path(own_shards[1]).unlink()
    with pytest.raises(ShardUnavailableError, match=r"00001\.tar"):
        for _ in range(9):
            next(iterator)


@pytest.mark.parametrize("pattern", ["{0..3}/*.tar", "*.tar.gz", []])
def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path, pattern: Any) -> None:
    source = f"{tmp_path}/{pattern}" if isinstance(pattern, str) else pattern
    with pytest.raises(ConfigError):
        jest(source)


@pytest.mark.parametrize("url", ["pipe:cat x.tar", "file::zip://x.tar", "ftp://host/x.tar"])
def test_urls_outside_the_allow_list_are_refused(url: str) -> None:
    with pytest.raises(UnsafeDataError):
        jest(url)


def bad_shard(tmp_path: Path, change: dict[str, Any], *, at: int = 5) -> str:
    """A shard of 24 examples, one of them changed; a value of None drops the member."""
    examples = [make_example(i) for i in range(24)]
    changed = {**examples[at], **change}
    examples[at] = {name: value for name, value in changed.items() if value is not None}
    return write_tar(tmp_path / "bad.tar", members(examples))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"jpg": b"not an image"}, "unreadable_image"),
        ({"jpg": None}, "missing_image"),
        ({"txt": None}, "missing_text"),
        ({"txt": b"\xff\xfe\xff"}, "unreadable_text"),
        ({"__key__": "000002"}, "duplicate_key"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_example_raises_with_its_key_or_is_skipped_and_counted(
    tmp_path: Path, change: dict[str, Any], reason: str, num_workers: int
) -> None:
    shard = bad_shard(tmp_path, change)
    with pytest.raises(BadExampleError) as caught:
        list(jest(shard, repeat=False, num_workers=num_workers))
    assert caught.value.reason == reason
    assert caught.value.key == change.get("__key__", "000005")
    assert "bad.tar" in str(caught.value) or caught.value.shard.endswith("bad.tar")

    dataset = jest(
        shard,
        repeat=False,
        num_workers=num_workers,
        on_bad_example="skip",
        selection=SelectionConfig(method="uniform"),
        super_batch_size=None,
    )
    keys = [key for batch in dataset for key in batch["key"]]
    metrics = dataset.metrics()
    assert metrics[f"skipped/{reason}"] >= 1
    assert len(keys) + metrics["samples_skipped"] + metrics["epoch_tail"] == 24


def test_skipped_examples_are_counted_once_across_a_resume(tmp_path: Path) -> None:
    shard = bad_shard(tmp_path, {"txt": None}, at=5)

    def dataset() -> JESTDataset:
        return jest(
            shard,
            repeat=False,
            on_bad_example="skip",
            selection=SelectionConfig(method="uniform"),
            super_batch_size=None,
        )

    first = dataset()
    iterator = iter(first)
    for _ in range(2):
        next(iterator)
    second = dataset()
    second.load_state_dict(first.state_dict())
    list(second)
    assert second.metrics()["samples_skipped"] == 1


def test_a_shard_of_bad_examples_only_ends_with_an_error(tmp_path: Path) -> None:
    examples = [{**make_example(i), "txt": b"\xff"} for i in range(120)]
    shard = write_tar(tmp_path / "bad.tar", members(examples))
    with pytest.raises(BadExampleLimitError):
        next(iter(jest(shard, on_bad_example="skip")))


def test_a_batch_larger_than_the_data_is_named_where_the_data_end(own_shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="batch_size=40, but a whole pass over the data gives"):
        list(jest(own_shards, batch_size=40, super_batch_size=None, repeat=False))


def test_lanes_that_do_not_fit_are_refused(own_shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="lanes"):
        next(iter(jest(own_shards, lanes=3)))


@pytest.mark.parametrize("model", ["learner", "reference"])
def test_embeddings_that_are_not_numbers_are_named(own_shards: list[str], model: str) -> None:
    broken = TinyTwoTower(seed=3)
    with torch.no_grad():
        broken.words.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=f"{model}.*text"):
        next(iter(jest(own_shards, **{model: broken})))


def test_images_without_a_transform_are_refused_with_the_fix(own_shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="Pass transform="):
        next(iter(jest(own_shards, transform=None)))


def test_texts_without_a_tokenizer_are_refused_with_the_fix(own_shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="Pass tokenizer="):
        next(iter(jest(own_shards, tokenizer=None)))


def test_views_of_different_shapes_are_named(own_shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="text must have one shape and dtype"):
        next(iter(jest(own_shards, tokenizer=lambda text: torch.zeros(len(text)))))


def test_a_source_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(ConfigError):
        jest(17)


def test_an_empty_shard_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(ShardError):
        next(iter(jest(TarSource(f"{tmp_path}/empty.tar"))))


@pytest.mark.parametrize("bad", ["shape", "name"])
def test_views_that_differ_between_shards_are_named(tmp_path: Path, bad: str) -> None:
    """Lanes are read block by block, so that each block alone is consistent."""
    paths = write_shards(tmp_path, num_shards=8, examples_per_shard=16)

    def view(image: Any) -> Any:
        pixels = to_tensor(image)
        is_odd = bool(pixels.sum() > 150)
        if bad == "name":
            return {"a": pixels, **({"b": pixels} if is_odd else {})}
        return pixels[:1] if is_odd else pixels

    message = "one shape and dtype" if bad == "shape" else "do not have the same entries"
    with pytest.raises(ConfigError, match=message):
        list(islice(jest(paths, transform=view), 4))


def test_a_rule_that_is_no_rule_is_refused(own_shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="selection must be a SelectionConfig, got 'uniform'"):
        jest(own_shards, selection="uniform")


def test_a_train_transform_that_makes_no_tensor_is_named(own_shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="Pass train_transform="):
        next(iter(jest(own_shards, train_transform=lambda image: image)))


def test_weights_of_a_checkpoint_that_do_not_fit_are_refused_each_time(
    own_shards: list[str],
) -> None:
    """After the error nothing is scored with other weights than the checkpoint's."""
    with jest(own_shards, refresh_every=5) as dataset:
        next(iter(dataset))
        state = dataset.state_dict(include_learner_copy=True)
    with jest(own_shards, refresh_every=5, learner=TinyTwoTower(seed=1, width=8)) as dataset:
        dataset.load_state_dict(state)
        iterator = iter(dataset)
        next(iterator)  # chosen before the checkpoint
        for _ in range(2):
            with pytest.raises(ResumeMismatchError, match="the learner copy in the checkpoint"):
                next(iterator)
