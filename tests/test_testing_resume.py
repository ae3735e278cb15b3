"""`assert_resumes` accepts what resumes exactly, and says where anything else does not.

pytest tests/test_testing_resume.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.leaks import (
    children,
    no_leaks,  # noqa: F401
)
from support.models import TinyTwoTower, flipped, to_tensor, tokenize, train_step
from support.shards import make_example, write_shards

from jest_stream import JESTDataset, SelectionConfig
from jest_stream.testing.resume import assert_resumes
from jest_stream.types import Example

pytestmark = pytest.mark.usefixtures("no_leaks")

UNIFORM = SelectionConfig(method="uniform")


class Memory:
    """Two shards of 20 examples; `skew` is added to where reading goes on."""

    num_shards = 2
    fingerprint = "memory"

    def __init__(self, skew: int = 0) -> None:
        self.skew = skew

    def shard_name(self, shard: int) -> str:
        return f"shard {shard}"

    def read(self, shard: int, *, offset: int = 0, index: int = 0) -> Iterator[tuple[Example, int]]:
        if index:
            index += self.skew
        for number in range(index, 20):
            yield make_example(20 * shard + number, size=8), 0


def jest(source: Any, **options: Any) -> JESTDataset:
    defaults: dict[str, Any] = {
        "selection": UNIFORM,
        "transform": to_tensor,
        "tokenizer": tokenize,
        "batch_size": 4,
        "as_dict": True,
    }
    return JESTDataset(source, **{**defaults, **options})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repeat": False, "batch_size": 15},
        {"repeat": False, "batch_size": 20},  # also where a pass ends with nothing left
        {"steps_per_epoch": 2},
        {"train_transform": flipped, "as_dict": False},
    ],
)
def test_a_source_that_keeps_its_place_is_accepted(options: dict[str, Any]) -> None:
    assert_resumes(lambda: jest(Memory(), **options))


def test_a_source_that_loses_its_place_is_named_with_step_and_difference() -> None:
    with pytest.raises(
        AssertionError,
        match=r"resumed at step 3: the batch of step 3 is not that of .*: batch\['image'\]\[",
    ):
        assert_resumes(lambda: jest(Memory(skew=1)), at=[0, 3])
    # 20 candidates of two lanes are in flight at step 1 already: read again from its start.
    with pytest.raises(AssertionError, match=r"resumed at step 2: .* batch\['key'\]\[\d\] is '"):
        assert_resumes(lambda: jest(KeysOnly(skew=2)), at=[2])


class KeysOnly(Memory):
    """Gives the same picture and text each time."""

    def read(self, shard: int, *, offset: int = 0, index: int = 0) -> Iterator[tuple[Example, int]]:
        for example, offset_after in super().read(shard, offset=offset, index=index):
            yield {**make_example(0, size=8), "__key__": example["__key__"]}, offset_after


def test_a_view_that_is_not_deterministic_is_named() -> None:
    calls = iter(range(10_000))
    with pytest.raises(AssertionError, match=r"a second run from the start: .*batch\['text'\]"):
        assert_resumes(
            lambda: jest(Memory(), tokenizer=lambda text: torch.tensor([next(calls)])), at=[3]
        )


def test_a_learner_is_trained_and_put_back(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, num_shards=2, examples_per_shard=16)
    learner = TinyTwoTower(1)
    before = learner.image.detach().clone()
    options: dict[str, Any] = {"selection": None, "reference": TinyTwoTower(2), "refresh_every": 3}
    options["filter_ratio"] = 0.5

    def much(batch: Any) -> None:
        for _ in range(30):
            train_step(learner, (batch["image"], batch["text"]))

    train: Any = {"learner": learner, "train_step": much}
    assert_resumes(
        lambda: jest(shards, learner=learner, **options), include_learner_copy=True, **train
    )
    assert torch.equal(learner.image, before)
    with pytest.raises(AssertionError, match="resumed at step 4"):  # between two refreshes
        assert_resumes(
            lambda: jest(shards, learner=learner, **options), num_steps=9, at=[4], **train
        )


def test_data_that_end_and_steps_beyond_the_run_are_named() -> None:
    with pytest.raises(AssertionError, match=r"at=9 is not in \[0, 6\]"):
        assert_resumes(lambda: jest(Memory()), at=[9])


def test_nothing_is_left_open(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, num_shards=2, examples_per_shard=16)
    assert_resumes(lambda: jest(shards, num_workers=1), num_steps=2)
    before = psutil.Process().open_files(), len(children())
    assert_resumes(lambda: jest(shards, num_workers=1), num_steps=2, at=[1])
    assert (psutil.Process().open_files(), len(children())) == before
