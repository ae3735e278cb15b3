"""A resumed run is the uninterrupted run, bit for bit, whichever step it resumes at.

pytest tests/test_resume.py
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, flipped, to_tensor, tokenize, train_step
from support.shards import write_shards
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from jest_stream import JESTDataset, Quota, SelectionConfig, TarSource
from jest_stream.errors import ResumeMismatchError
from jest_stream.pipeline.state import record_of
from jest_stream.testing.resume import assert_resumes
from jest_stream.types import Selection

pytestmark = pytest.mark.usefixtures("no_leaks")

NUM_STEPS = 9
Batch = tuple[list[str], Tensor, Tensor]

SHARDS = {"num_shards": 5, "examples_per_shard": 12}
"""Five shards of 12 examples: a run of nine steps passes over them several times."""


def jest(shards: Any, learner: TinyTwoTower | None, **options: Any) -> JESTDataset:
    defaults = {
        "reference": TinyTwoTower(seed=2),
        "transform": to_tensor,
        "tokenizer": tokenize,
        "train_transform": flipped,
        "batch_size": 6,
        "super_batch_size": 20,
        "as_dict": True,
    }
    return JESTDataset(shards, learner=learner, **{**defaults, **options})


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    """Saves and loads as a careful trainer does."""
    file = io.BytesIO()
    torch.save(state, file)
    without_copy = io.BytesIO()
    torch.save({**state, "learner_copy": None}, without_copy)
    assert without_copy.tell() < 20_000, "a checkpoint holds positions, not samples"
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_state(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for item, value in zip(found, expected, strict=True):
            assert_same_state(item, value)
    else:
        assert found == expected


def train(dataset: JESTDataset, learner: TinyTwoTower | None, num_steps: int) -> list[Batch]:
    """Trains on the next batches; ends early where a pass ends."""
    seen = []
    iterator = iter(dataset)
    for _ in range(num_steps):
        batch = next(iterator, None)
        if batch is None:
            iterator = iter(dataset)
            batch = next(iterator)
        seen.append((batch["key"], batch["image"], batch["text"]))
        if learner is not None:
            train_step(learner, (batch["image"], batch["text"]))
    return seen


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [keys for keys, _, _ in found] == [keys for keys, _, _ in expected]
    for (_, images, texts), (_, expected_images, expected_texts) in zip(
        found, expected, strict=True
    ):
        assert torch.equal(images, expected_images)
        assert torch.equal(texts, expected_texts)


def assert_resumes_everywhere(shards: list[str], *, include_copy: bool = False, **o: Any) -> None:
    learner = TinyTwoTower(seed=1)
    assert_resumes(
        lambda: jest(shards, learner, **o),
        num_steps=NUM_STEPS,
        learner=learner,
        train_step=lambda batch: train_step(learner, (batch["image"], batch["text"])),
        include_learner_copy=include_copy,
    )


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_every_step_resumes_exactly(shards: list[str], lookahead: int) -> None:
    assert_resumes_everywhere(shards, lookahead=lookahead)


def test_every_step_resumes_exactly_with_worker_processes(shards: list[str]) -> None:
    assert_resumes_everywhere(shards, num_workers=2)


def test_every_step_resumes_exactly_over_passes_with_an_end(shards: list[str]) -> None:
    assert_resumes_everywhere(shards, repeat=False)


def test_every_step_resumes_exactly_within_epochs_of_a_given_length(shards: list[str]) -> None:
    assert_resumes_everywhere(shards, steps_per_epoch=4)


def test_every_step_resumes_exactly_with_rare_refreshes_and_the_copy_saved(
    shards: list[str],
) -> None:
    assert_resumes_everywhere(shards, refresh_every=4, include_copy=True)


@pytest.mark.parametrize("method", ["uniform", "independent"])
def test_the_other_methods_resume_exactly(shards: list[str], method: Any) -> None:
    assert_resumes_everywhere(shards, selection=SelectionConfig(method=method))


def test_without_the_copy_a_resume_at_a_refresh_is_exact(shards: list[str]) -> None:
    options = {"refresh_every": 3, "lookahead": 1}
    learner = TinyTwoTower(seed=1)
    uninterrupted = train(jest(shards, learner, **options), learner, NUM_STEPS)
    learner = TinyTwoTower(seed=1)
    dataset = jest(shards, learner, **options)
    train(dataset, learner, 6)
    resumed = jest(shards, learner, **options)
    resumed.load_state_dict(dataset.state_dict())
    assert_same(train(resumed, learner, 3), uninterrupted[6:])


def test_resuming_twice_in_a_row_changes_nothing(shards: list[str]) -> None:
    uninterrupted = train(jest(shards, learner := TinyTwoTower(1)), learner, NUM_STEPS)
    learner = TinyTwoTower(1)
    state, seen = jest(shards, learner).state_dict(), []
    for step in (2, 3, 4):
        dataset = jest(shards, learner)
        dataset.load_state_dict(through_disk(state))
        seen += train(dataset, learner, step)
        state = dataset.state_dict()
    assert_same(seen, uninterrupted)


def test_a_state_is_what_was_loaded_until_a_batch_is_drawn(shards: list[str]) -> None:
    learner = TinyTwoTower(1)
    dataset = jest(shards, learner)
    fresh = dataset.state_dict()
    assert fresh["step"] == 0 and fresh["ranks"]["0"]["in_flight"] == []
    train(dataset, learner, 3)
    saved = dataset.state_dict(include_learner_copy=True)
    resumed = jest(shards, learner)
    resumed.load_state_dict(saved)
    iter(resumed)
    again = resumed.state_dict(include_learner_copy=True)
    assert_same_state(again, saved)


def test_saving_neither_reads_nor_advances(shards: list[str]) -> None:
    learner = TinyTwoTower(1)
    expected = train(jest(shards, learner := TinyTwoTower(1)), learner, 4)
    learner = TinyTwoTower(1)
    dataset, seen = jest(shards, learner), []
    iterator = iter(dataset)
    for _ in range(4):
        assert_same_state(dataset.state_dict(), iterator.state_dict())
        batch = next(iterator)
        seen.append((batch["key"], batch["image"], batch["text"]))
        train_step(learner, (batch["image"], batch["text"]))
    assert_same(seen, expected)


def test_a_state_does_not_change_when_training_goes_on(shards: list[str]) -> None:
    learner = TinyTwoTower(1)
    dataset = jest(shards, learner)
    train(dataset, learner, 2)
    state = dataset.state_dict(include_learner_copy=True)
    saved = copy.deepcopy(state)
    train(dataset, learner, 3)
    assert_same_state(state, saved)


def test_nothing_is_lost_or_repeated_with_super_batches_in_flight(shards: list[str]) -> None:
    options: dict[str, Any] = {
        "selection": SelectionConfig(method="uniform"),
        "super_batch_size": 6,
        "lookahead": 4,
        "repeat": False,
    }
    dataset = jest(shards, None, **options)
    first = train(dataset, None, 3)
    resumed = jest(shards, None, **options)
    resumed.load_state_dict(through_disk(dataset.state_dict()))
    rest = [batch["key"] for batch in resumed]
    keys = [key for batch in [*(keys for keys, _, _ in first), *rest] for key in batch]
    assert sorted(keys) == [f"{i:06d}" for i in range(60)]


def test_counters_go_on_after_a_resume(shards: list[str]) -> None:
    counted = ("steps", "samples_read", "samples_scored", "samples_trained", "epoch_tail")
    learner = TinyTwoTower(1)
    dataset = jest(shards, learner, repeat=False, super_batch_size=25)
    states = []
    iterator = iter(dataset)
    for _ in range(6):
        if next(iterator, None) is None:
            iterator = iter(dataset)
            next(iterator)
        states.append(through_disk(dataset.state_dict()))
    expected = {name: dataset.metrics()[name] for name in counted}
    for step, state in enumerate(states, start=1):
        resumed = jest(shards, learner, repeat=False, super_batch_size=25)
        resumed.load_state_dict(state)
        train(resumed, None, 6 - step)
        assert {name: resumed.metrics()[name] for name in counted} == expected, step


class Counting(TarSource):
    """Counts the examples that it reads, as a source of one's own may."""

    num_read = 0

    def read(self, shard: int, *, offset: int = 0, index: int = 0) -> Any:
        for step in super().read(shard, offset=offset, index=index):
            self.num_read += 1
            yield step

    def take_counts(self) -> dict[str, int]:
        counted, self.num_read = self.num_read, 0
        return {"examples_read": counted}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_source_counts_and_skipped_shards_reach_metrics_and_checkpoints(
    tmp_path: Path, num_workers: int
) -> None:
    shards = write_shards(tmp_path, num_shards=4, examples_per_shard=12)
    Path(shards[1]).write_bytes(Path(shards[1]).read_bytes()[:4096])
    options: dict[str, Any] = {
        "selection": SelectionConfig(method="uniform"),
        "on_bad_shard": "skip",
        "repeat": False,
        "num_workers": num_workers,
        "super_batch_size": 6,
        "lanes": 2,
    }
    with jest(Counting(shards), None, **options) as whole:
        expected = [batch["key"] for batch in whole]
        wanted = whole.metrics()
    assert wanted["shards_skipped"] == 1
    assert wanted["shards_skipped/truncated"] == 1
    assert wanted["samples_read"] + wanted["epoch_tail"] >= 36
    with jest(Counting(shards), None, **options) as first:
        seen = train(first, None, 3)
        state = through_disk(first.state_dict())
        assert state["ranks"]["0"]["counters"]
        before = first.metrics()["examples_read"]
    with jest(Counting(shards), None, **options) as resumed:
        resumed.load_state_dict(state)
        assert resumed.metrics()["examples_read"] == before > 0
        assert [keys for keys, _, _ in seen] + [b["key"] for b in resumed] == expected
        assert resumed.metrics()["shards_skipped"] == 1
        assert resumed.metrics()["samples_read"] == wanted["samples_read"]
        # At most what was in flight, or waited in blocks, is read again.
        again = resumed.metrics()["examples_read"] - wanted["examples_read"]
        assert again <= 2 * 6 + 2 * 64


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")  # torchdata 0.11, torch 2.15
@pytest.mark.parametrize("step", [0, 1, 3, 4, 5])
def test_torchdatas_stateful_loader_saves_and_resumes(shards: list[str], step: int) -> None:
    def loader(learner: TinyTwoTower) -> StatefulDataLoader:
        return StatefulDataLoader(jest(shards, learner, steps_per_epoch=4), batch_size=None)

    first, expected, states = loader(TinyTwoTower(1)), [], []
    states.append(first.state_dict())
    for _ in range(3):
        for batch in first:
            expected.append(batch["key"])
            states.append(first.state_dict())
    resumed = loader(TinyTwoTower(1))
    resumed.load_state_dict(through_disk(states[step]))
    tail = [batch["key"] for _ in range(3) for batch in resumed]
    assert tail[: 12 - step] == expected[step:]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("batch_size", 5, "batch_size=6, this dataset has batch_size=5"),
        ("super_batch_size", 40, "super_batch_size=.*20.*, this dataset has super_batch_size=.*40"),
        ("seed", 7, "seed=0, this dataset has seed=7"),
        ("lanes", 2, "lanes=5, this dataset has lanes=2"),
        ("lookahead", 2, "lookahead=1, this dataset has lookahead=2"),
        ("repeat", False, "repeat=True, this dataset has repeat=False"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    shards: list[str], option: str, value: Any, message: str
) -> None:
    state = jest(shards, TinyTwoTower()).state_dict()
    with pytest.raises(ResumeMismatchError, match=message):
        jest(shards, TinyTwoTower(), **{option: value}).load_state_dict(state)


def test_other_shards_are_refused(shards: list[str], tmp_path: Path) -> None:
    state = jest(shards, TinyTwoTower()).state_dict()
    others = [str(Path(path).rename(tmp_path / f"other-{i}.tar")) for i, path in enumerate(
        write_shards(tmp_path, num_shards=5, examples_per_shard=12))]  # fmt: skip
    with pytest.raises(ResumeMismatchError, match="source="):
        jest(others, TinyTwoTower()).load_state_dict(state)


def test_a_state_of_another_release_is_refused(shards: list[str]) -> None:
    state = {**jest(shards, TinyTwoTower()).state_dict(), "version": 0}
    with pytest.raises(ResumeMismatchError, match="format version 0, this release reads 2"):
        jest(shards, TinyTwoTower()).load_state_dict(state)


def test_shards_that_shrank_are_noticed(tmp_path: Path) -> None:
    write_shards(tmp_path, num_shards=1, examples_per_shard=40)
    learner = TinyTwoTower(1)
    dataset = jest(f"{tmp_path}/*.tar", learner, repeat=False, lookahead=0)
    train(dataset, learner, 1)
    state = dataset.state_dict()
    dataset = jest(f"{tmp_path}/*.tar", learner, repeat=False)
    state["settings"]["lookahead"] = 1
    state["ranks"]["0"]["in_flight"] = 2 * [record_of(20, 0, selection_of(6))]
    dataset.load_state_dict(state)
    iterator = iter(dataset)
    next(iterator)
    with pytest.raises(ResumeMismatchError, match="20 examples in flight, but the shards have 0"):
        next(iterator)


def selection_of(size: int) -> Selection:
    return Selection(
        indices=torch.arange(size),
        weights=torch.ones(size),
        effective_support=torch.ones(1),
        selected_score=torch.zeros(()),
        candidate_score=torch.zeros(()),
        group_counts=torch.zeros(0, dtype=torch.int64),
        quota_excess=torch.zeros(0, dtype=torch.int64),
        is_finite=torch.tensor(True),
    )


def test_a_resume_into_shorter_epochs_ends_them(shards: list[str]) -> None:
    learner = TinyTwoTower(1)
    dataset = jest(shards, learner)
    train(dataset, learner, 5)
    resumed = jest(shards, learner, steps_per_epoch=3)
    resumed.load_state_dict(dataset.state_dict())
    assert [len(list(resumed)) for _ in range(2)] == [1, 3]  # 5 = 3 + 2: one is left


def test_other_quotas_are_refused(shards: list[str]) -> None:
    def dataset(*groups: int) -> JESTDataset:
        rule = SelectionConfig(
            group_by=lambda example: example["json"]["index"] % 2,
            quotas={group: Quota(floor=0.1) for group in groups},
        )
        return jest(shards, TinyTwoTower(1), selection=rule)

    first = dataset(0, 1)
    train(first, None, 1)
    with pytest.raises(ResumeMismatchError, match="quotas="):
        dataset(0).load_state_dict(first.state_dict())


def test_what_a_user_does_to_a_batch_does_not_reach_a_state(shards: list[str]) -> None:
    dataset = jest(shards, TinyTwoTower(1))
    iterator = iter(dataset)
    next(iterator)
    state = dataset.state_dict()
    saved = copy.deepcopy(state)
    next(iterator)["weight"].zero_()
    assert_same_state(state, saved)
