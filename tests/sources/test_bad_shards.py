"""`on_bad_shard="skip"` leaves out the rest of a bad shard, counted and logged, and nothing else.

pytest tests/sources/test_bad_shards.py
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support import block_readers as readers
from support.leaks import no_leaks
from support.pairs import alone, sizes_of, stream_config
from support.shards import make_example, members, write_shards, write_tar

from jest_stream.errors import (
    BadExampleError,
    BadExampleLimitError,
    ShardError,
    ShardTruncatedError,
    ShardUnavailableError,
    UnsafeDataError,
)
from jest_stream.pipeline.device.streams import Ring
from jest_stream.pipeline.super_batches import Position, SuperBatchReader
from jest_stream.sources.iterable import IterableSource
from jest_stream.sources.reader import Block
from jest_stream.sources.tar import TarSource
from jest_stream.types import Cursor, Example, Source

__all__ = ["no_leaks"]
pytestmark = pytest.mark.usefixtures("no_leaks")

WORKERS = [0, 1, 2]
LANES = 2


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """4 shards of 8 examples, two per lane. Shard 1 is cut within its sixth example."""
    written = write_shards(tmp_path / "shards", num_shards=4, examples_per_shard=8, size=8)
    data = Path(written[1]).read_bytes()
    cut = data.index(b"000013.txt")
    Path(written[1]).write_bytes(data[:cut])
    return written


def rows(items: list[str]) -> dict[str, Any]:
    return {"key": items}


open_reader = partial(readers.open_reader, num_lanes=LANES, collate=rows, on_bad_shard="skip")


def keys_of(blocks: list[Block]) -> list[str]:
    return [key for block in blocks if block.items for key in block.items["key"]]


@pytest.mark.parametrize("num_workers", WORKERS)
def test_the_examples_before_the_fault_and_those_of_other_shards_are_delivered(
    paths: list[str], num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    reader = open_reader(TarSource(paths), num_workers=num_workers)
    blocks = list(iter(reader.read, None))
    expected = [f"{index:06d}" for index in range(32) if index not in (13, 14, 15)]
    assert sorted(keys_of(blocks)) == expected
    ((_, skip),) = [entry for block in blocks for entry in block.skipped_shards]
    assert (skip.shard, skip.reason) == (paths[1], "truncated")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("jest_stream", logging.WARNING)
    assert paths[1] in record.message and "cut off" in record.message


def test_by_default_a_bad_shard_is_raised(paths: list[str]) -> None:
    with pytest.raises(ShardTruncatedError):
        list(iter(open_reader(TarSource(paths), on_bad_shard="raise").read, None))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_is_gone_or_garbage_is_left_out_whole(
    paths: list[str], num_workers: int
) -> None:
    source = TarSource(paths)
    Path(paths[1]).unlink()
    Path(paths[2]).write_bytes(b"<html>503 Service Unavailable</html>" * 99)
    blocks = list(iter(open_reader(source, num_workers=num_workers).read, None))
    assert sorted(keys_of(blocks)) == [f"{index:06d}" for index in [*range(8), *range(24, 32)]]
    reasons = {skip.shard: skip.reason for block in blocks for _, skip in block.skipped_shards}
    assert reasons[paths[1]] == "unavailable"
    assert reasons[paths[2]] in ("damaged", "changed")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_skipped_depends_neither_on_workers_nor_on_where_reading_resumes(
    paths: list[str], num_workers: int
) -> None:
    reader = open_reader(TarSource(paths), end_epoch=2)
    lanes: dict[int, list[tuple[str, Cursor]]] = {lane: [] for lane in range(LANES)}
    for block in iter(reader.read, None):
        if block.items:
            lanes[block.lane] += zip(block.items["key"], block.cursors, strict=True)
    step = 1 if num_workers == 0 else 9
    for position in range(0, min(map(len, lanes.values())), step):
        cursors = {lane: pairs[position][1] for lane, pairs in lanes.items()}
        again = open_reader(TarSource(paths), cursors=cursors, end_epoch=2, num_workers=num_workers)
        tails: dict[int, list[str]] = {lane: [] for lane in range(LANES)}
        for block in iter(again.read, None):
            tails[block.lane] += block.items["key"] if block.items else []
        assert tails == {
            lane: [key for key, _ in pairs[position + 1 :]] for lane, pairs in lanes.items()
        }


def test_a_shard_is_logged_once_over_epochs_and_readers(
    paths: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    reported: set[str] = set()
    for _ in range(2):
        reader = open_reader(TarSource(paths), end_epoch=3, reported_shards=reported)
        blocks = list(iter(reader.read, None))
        assert sum(len(block.skipped_shards) for block in blocks) == 3
    assert len(caplog.records) == 1
    assert reported == {paths[1]}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("end_epoch", [1, None])
def test_a_lane_of_bad_shards_only_raises_instead_of_spinning(
    paths: list[str], num_workers: int, end_epoch: int | None
) -> None:
    source = TarSource(paths)
    for path in paths:
        Path(path).unlink()
    reader = open_reader(source, num_workers=num_workers, end_epoch=end_epoch)
    with pytest.raises(ShardError, match=r"lane 0 gave no example .*on_bad_shard='skip'.*00") as e:
        reader.read()
    assert e.value.shard in paths


class Failing:
    """Shards of two examples; those of an odd number raise after the first."""

    num_shards = 4
    fingerprint = "failing"

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def shard_name(self, shard: int) -> str:
        return f"shard {shard}"

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        for number in range(index, 2):
            if number == 1 and shard % 2 == 1:
                raise self._error
            yield {"__key__": f"{shard}/{number}"}, 0


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        UnsafeDataError("u"),
        MemoryError("m"),
        NameError("n"),
        TypeError("t"),
        OSError(24, "Too many open files"),
        RuntimeError("r"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_other_error_is_ever_skipped(error: Exception, num_workers: int) -> None:
    reader = open_reader(Failing(error), num_workers=num_workers, on_bad_example="skip")
    with pytest.raises(type(error)):
        list(iter(reader.read, None))


def test_a_source_of_ones_own_says_what_may_be_skipped() -> None:
    source = Failing(ShardUnavailableError("no such shard", shard="shard 1", attempts=3))
    blocks = list(iter(open_reader(source).read, None))
    assert sorted(keys_of(blocks)) == ["0/0", "0/1", "1/0", "2/0", "2/1", "3/0"]
    assert {skip.reason for block in blocks for _, skip in block.skipped_shards} == {"unavailable"}


def row(example: Example) -> dict[str, Any]:
    return {"key": example["__key__"]}


def super_batches(source: Source, size: int, num_workers: int = 0) -> SuperBatchReader:
    """Reads super-batches of a size, one pass over two lanes."""
    return SuperBatchReader(
        stream_config(on_bad_shard="skip", num_workers=num_workers),
        sizes_of(1, size),
        source=source,
        layout=alone(LANES),
        prepare=row,
    )


def cut(reader: SuperBatchReader, size: int) -> list[tuple[list[str], dict[str, int], Position]]:
    """Returns all super-batches: their keys, counts and where they start."""
    batches = []
    while True:
        batch = reader.read(size, slot=Ring().slot(), end_epoch=1)
        batches.append((batch.columns.get("key", []), batch.counts, batch.position))
        if batch.size < size:
            return batches


def total(counts: list[dict[str, int]]) -> dict[str, int]:
    names = {name for count in counts for name in count}
    return {name: sum(count.get(name, 0) for count in counts) for name in sorted(names)}


def shards_only(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name.startswith("shards_")}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_super_batches_count_skipped_shards_once_also_when_resumed_anywhere(
    paths: list[str], num_workers: int
) -> None:
    batches = cut(super_batches(TarSource(paths), 5, num_workers), 5)
    counts = [shards_only(batch[1]) for batch in batches]
    assert total(counts) == {"shards_skipped": 1, "shards_skipped/truncated": 1}
    for number, (_, _, position) in enumerate(batches):
        reader = super_batches(TarSource(paths), 5)
        reader.go_to(position)
        resumed = reader.read(5, slot=Ring().slot(), end_epoch=1)
        assert resumed.columns.get("key", []) == batches[number][0]
        assert shards_only(resumed.counts) == counts[number]
        reader.pause()


class Counting(Failing):
    """Counts what it reads, as storage does."""

    def __init__(self) -> None:
        super().__init__(ShardError("bad", shard="shard 1"))
        self._num_read = 0

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        for step in super().read(shard, offset=offset, index=index):
            self._num_read += 1
            yield step

    def take_counts(self) -> dict[str, int]:
        counts, self._num_read = {"storage_bytes": 100 * self._num_read}, 0
        return counts


@pytest.mark.parametrize("num_workers", WORKERS)
def test_what_the_source_counts_arrives_from_every_process(num_workers: int) -> None:
    batches = cut(super_batches(Counting(), 2, num_workers), 2)
    counts = total([counts for _, counts, _ in batches])
    assert counts == {"shards_skipped": 2, "shards_skipped/damaged": 2, "storage_bytes": 600}


def mixed(path: Path, num_good: int, num_bad: int) -> str:
    """A shard in which bad examples are spread evenly."""
    examples = []
    for index in range(num_good + num_bad):
        is_bad = (index + 1) * num_bad // (num_good + num_bad) > index * num_bad // (
            num_good + num_bad
        )
        examples.append({"__key__": f"{index:05d}", "txt": b"\xff" if is_bad else b"x"})
    return write_tar(path, members(examples))


def text_of(example: Example) -> str:
    from jest_stream.views.decode import Decoded

    return str(Decoded(example)["txt"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_rate_of_bad_examples_above_the_limit_is_an_error_after_probation(
    tmp_path: Path, num_workers: int
) -> None:
    paths = [mixed(tmp_path / f"{i}.tar", 582, 18) for i in range(2)]  # 3 % of 1,200
    settings: dict[str, Any] = {
        "prepare": text_of,
        "on_bad_example": "skip",
        "num_workers": num_workers,
        "block_size": 10,
    }
    reader = open_reader(TarSource(paths), **settings)
    blocks = []
    with pytest.raises(BadExampleLimitError, match=r"of 1,0\d\d examples.*max_bad_fraction=0.01"):
        while (block := reader.read()) is not None:
            blocks.append(block)
    num_read = sum(block.num_examples + len(block.skipped) for block in blocks)
    assert 1000 <= num_read < 1020  # the same for any number of workers
    reader = open_reader(TarSource(paths), **settings, max_bad_fraction=0.03)
    assert len(keys_of(list(iter(reader.read, None)))) == 2 * 582


def test_a_rate_below_the_limit_and_few_examples_are_no_error(tmp_path: Path) -> None:
    for num_good, num_bad in ((1188, 12), (500, 400)):
        path = mixed(tmp_path / f"{num_good}.tar", num_good, num_bad)
        reader = open_reader(
            TarSource(path),
            cursors={0: Cursor(0, 0, 0, 0)},
            num_lanes=1,
            prepare=text_of,
            on_bad_example="skip",
        )
        assert len(keys_of(list(iter(reader.read, None)))) == num_good


def test_an_endless_iterable_is_not_touched_by_either_limit() -> None:
    source = IterableSource([make_example(index, size=8) for index in range(4)])
    reader = open_reader(source, num_lanes=1, cursors={0: Cursor(0, 0, 0, 0)}, end_epoch=None)
    blocks = list(islice(iter(reader.read, None), 9))
    reader.close()
    assert sum(block.num_examples for block in blocks) == 27
