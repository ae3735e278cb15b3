"""A failure in a lane or a worker arrives from `read`, once, as itself, after the blocks before it.

Nothing survives it: no process, no descriptor, no folder.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import block_readers as readers
from support.endings import EARLY_ENDS, assert_no_worker_outlives
from support.leaks import children, no_leaks
from support.shards import make_example, members, write_shards, write_tar

from jest_stream.errors import (
    BadExampleError,
    BadExampleLimitError,
    ShardTruncatedError,
    StalledError,
    UnsafeDataError,
    UserCodeError,
    WorkerDiedError,
)
from jest_stream.sources.reader import Block, BlockReader
from jest_stream.sources.tar import TarSource
from jest_stream.types import Example
from jest_stream.views.decode import Decoded
from jest_stream.workers import process
from jest_stream.workers.transport import WorkerTraceback

WORKERS = [0, 1, 2]


__all__ = ["no_leaks"]
pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """4 shards of 8 examples, one per lane."""
    return write_shards(tmp_path / "shards", num_shards=4, examples_per_shard=8, size=8)


def open_reader(paths: list[str], **changes: Any) -> BlockReader:
    return readers.open_reader(TarSource(paths), **{"num_lanes": 4, **changes})


def read_until_error(reader: BlockReader, kind: type[Exception]) -> tuple[list[Block], Any]:
    blocks = []
    with pytest.raises(kind) as raised:
        while (block := reader.read()) is not None:
            blocks.append(block)
    assert type(raised.value) is kind
    assert children() == []  # at once, not at close()
    return blocks, raised.value


def broken_at(paths: list[str], shard: int, index: int, member: str, data: bytes) -> str:
    """Rewrites a shard with one member replaced; returns the example's key."""
    examples = [make_example(i, size=8) for i in range(8 * shard, 8 * shard + 8)]
    examples[index][member] = data
    write_tar(Path(paths[shard]), members(examples))
    return examples[index]["__key__"]


def decode_all(example: Example) -> str:
    decoded = Decoded(example)
    assert decoded["jpg"].size == (8, 8)
    return f"{decoded['__key__']} {decoded['txt']}"


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_bad_example_is_raised_after_the_examples_before_it(
    paths: list[str], num_workers: int
) -> None:
    key = broken_at(paths, 2, 4, "jpg", b"no image")
    reader = open_reader(paths, prepare=decode_all, num_workers=num_workers)
    blocks, error = read_until_error(reader, BadExampleError)
    assert (error.key, error.shard, error.reason) == (key, paths[2], "unreadable_image")
    lane = blocks[-4].lane  # the next block of this lane would have been due
    items = [item.split()[0] for block in blocks if block.lane == lane for item in block.items]
    assert items == [f"{index:06d}" for index in range(16, 20)]  # all four before it
    assert [block.lane for block in blocks] == ([0, 1, 2, 3] * 3)[: len(blocks)]
    if num_workers:
        assert isinstance(error.__cause__, WorkerTraceback)
        assert "PIL" in str(error.__cause__) and "decode.py" in str(error.__cause__)
    # Asked again, it tries again, and says so again: never a hang, never a silent end.
    assert read_until_error(reader, BadExampleError)[0] == []


@pytest.mark.parametrize("num_workers", WORKERS)
def test_bad_examples_are_skipped_where_asked_and_named_with_their_place(
    paths: list[str], num_workers: int
) -> None:
    broken_at(paths, 0, 0, "txt", b"\xff")
    broken_at(paths, 1, 7, "jpg", b"")
    reader = open_reader(paths, prepare=decode_all, num_workers=num_workers, on_bad_example="skip")
    blocks = list(iter(reader.read, None))
    skipped = {
        block.items[0][:6]: [*block.skipped]
        for block in blocks
        if block.items is not None and block.skipped
    }
    # Before the first example of shard 0; after the first of the last block of shard 1.
    assert skipped == {"000001": [(0, "unreadable_text")], "000014": [(1, "unreadable_image")]}
    assert sum(block.num_examples for block in blocks) == 30


@pytest.mark.parametrize("num_workers", WORKERS)
def test_what_the_source_finds_bad_is_skipped_too(paths: list[str], num_workers: int) -> None:
    files = members(make_example(index, size=8) for index in (0, 1, 0, 2))
    write_tar(Path(paths[0]), files)
    with pytest.raises(BadExampleError, match="comes again"):
        list(iter(open_reader(paths, num_workers=num_workers).read, None))
    reader = open_reader(paths, num_workers=num_workers, on_bad_example="skip")
    blocks = list(iter(reader.read, None))
    assert [s for block in blocks for s in block.skipped] == [(2, "duplicate_key")]
    keys = [key for block in blocks for key in block.items or []]
    assert sorted(keys)[:3] == ["000000", "000001", "000002"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_examples_in_a_row_are_an_error(tmp_path: Path, num_workers: int) -> None:
    good = [{"__key__": f"a{index}", "txt": b"x"} for index in range(2)]
    bad = [{"__key__": f"b{index}", "txt": b"\xff"} for index in range(100)]
    settings: dict[str, Any] = {
        "num_lanes": 1,
        "prepare": lambda example: Decoded(example)["txt"],
        "on_bad_example": "skip",
        "num_workers": num_workers,
    }
    path = write_tar(tmp_path / "99.tar", members([good[0], *bad[:99], good[1]]))
    (block, *_) = list(iter(open_reader([path], **settings).read, None))
    assert (block.num_examples, len(block.skipped)) == (2, 99)
    path = write_tar(tmp_path / "100.tar", members([good[0], *bad, good[1]]))
    blocks, error = read_until_error(open_reader([path], **settings), BadExampleLimitError)
    assert [block.items for block in blocks] == [["x"]]
    assert "100 bad examples in a row in lane 0" in str(error) and "'b99'" in str(error)


class OddError(Exception):
    """Can be sent to another process, but not received there."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class HeavyError(Exception):
    """Cannot be sent at all."""

    def __init__(self) -> None:
        super().__init__("heavy")
        self.lock = threading.Lock()


def raising(error: BaseException) -> Any:
    def prepare(example: Example) -> str:
        if example["__key__"] in ("000004", "000012", "000020", "000028"):
            raise error
        return example["__key__"]

    return prepare


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        TypeError("t"),
        AttributeError("a"),
        NameError("n"),
        ImportError("i"),
        MemoryError("m"),
        KeyError("k"),
        OSError(28, "No space left"),
        UnsafeDataError("u"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_user_code_are_never_bad_examples(
    paths: list[str], error: Exception, num_workers: int
) -> None:
    reader = open_reader(
        paths, prepare=raising(error), num_workers=num_workers, on_bad_example="skip"
    )
    blocks, raised = read_until_error(reader, type(error))
    assert raised.args == error.args
    assert len(blocks) == 8  # two turns: items 0-2, then item 3 alone
    if num_workers:
        assert "in prepare" in str(raised.__cause__)


@pytest.mark.parametrize("error", [OddError(1, 2), HeavyError()])
def test_an_error_that_cannot_travel_arrives_as_text(paths: list[str], error: Exception) -> None:
    reader = open_reader(paths, prepare=raising(error), num_workers=1)
    _, raised = read_until_error(reader, RuntimeError)
    assert str(raised) == f"{type(error).__name__}: {error}"
    assert "in prepare" in str(raised.__cause__)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stray_stop_iteration_does_not_end_the_data(paths: list[str], num_workers: int) -> None:
    reader = open_reader(paths, prepare=raising(StopIteration()), num_workers=num_workers)
    assert "raised StopIteration" in str(read_until_error(reader, UserCodeError)[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_that_do_not_collate_are_an_error(paths: list[str], num_workers: int) -> None:
    reader = open_reader(
        paths, prepare=lambda example: example["txt"], collate=torch.stack, num_workers=num_workers
    )
    assert "expected Tensor" in str(read_until_error(reader, TypeError)[1])


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_truncated_shard_is_an_error_with_its_offset(paths: list[str], num_workers: int) -> None:
    data = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(data[: len(data) // 2])
    blocks, error = read_until_error(
        open_reader(paths, num_workers=num_workers), ShardTruncatedError
    )
    assert (error.shard, error.offset) == (paths[1], len(data) // 2 // 512 * 512)
    assert all(block.num_examples for block in blocks)


def workers_of_this_process() -> list[psutil.Process]:
    return sorted(children(), key=lambda process: process.pid)


def heavy(example: Example) -> bytes:
    return bytes(1 << 20)


@pytest.mark.parametrize("prepare", [heavy, lambda example: torch.zeros(1 << 20), lambda _: 0])
@pytest.mark.parametrize("num_killed", [1, 2])
def test_a_killed_worker_is_named_with_its_lanes(
    paths: list[str], prepare: Any, num_killed: int
) -> None:
    """Also while it writes: most of the time it waits with half a block in the pipe."""
    reader = open_reader(paths, prepare=prepare, num_workers=2, end_epoch=None)
    first = reader.read()
    processes = workers_of_this_process()
    for worker in processes[-num_killed:]:
        worker.kill()
    # It surfaces in read() and nowhere else, whatever the training loop does meanwhile.
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        torch.ones(9).sum()
    killed_at = time.monotonic()
    with pytest.raises(WorkerDiedError, match="was killed by SIGKILL.*memory") as raised:
        for _ in range(50):
            reader.read()
    assert time.monotonic() - killed_at < 10
    number = 0 if num_killed == 2 and "worker 0" in str(raised.value) else 1
    lanes = "0, 2" if number == 0 else "1, 3"
    pid = processes[number].pid
    assert f"worker {number} of 2 (process {pid}), which reads lanes {lanes}," in str(raised.value)
    # Reading goes on where it stopped, in new processes.
    again = reader.read()
    assert first is not None and again is not None
    reader.close()


def test_reading_on_after_a_killed_worker_loses_and_repeats_nothing(paths: list[str]) -> None:
    expected = [block.items for block in iter(open_reader(paths).read, None)]
    reader = open_reader(paths, num_workers=2)
    items, num_deaths = [], 0
    while True:
        try:
            block = reader.read()
        except WorkerDiedError:
            num_deaths += 1
            continue
        if block is None:
            break
        items.append(block.items)
        if len(items) in (3, 7):
            workers_of_this_process()[0].kill()
    assert items == expected
    assert num_deaths <= 2  # a block that was on its way already may arrive


@pytest.mark.parametrize("leave", [os._exit, sys.exit])
def test_a_transform_that_exits_is_named(paths: list[str], leave: Any) -> None:
    reader = open_reader(paths, prepare=lambda example: leave(3), num_workers=1)
    with pytest.raises(WorkerDiedError, match=r"worker 0 of 1 .* ended with status 3"):
        reader.read()


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_worker_that_hangs_is_reported_and_ended(
    paths: list[str], is_deaf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_STOP_TIMEOUT_S", 0.5)

    def hang(example: Example) -> None:
        if is_deaf:  # not even SIGTERM helps
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()

    reader = open_reader(paths, prepare=hang, num_workers=1, timeout_s=0.5)
    start = time.monotonic()
    with pytest.raises(StalledError, match=r"worker 0 of 1 .* timeout_s=0.5") as raised:
        reader.read()
    assert time.monotonic() - start < 5
    assert "in hang" in str(raised.value)


def test_dropping_a_reader_stops_its_workers(paths: list[str]) -> None:
    reader = open_reader(paths, num_workers=2, prepare=heavy, end_epoch=None)
    reader.read()
    assert len(workers_of_this_process()) == 2
    del reader
    assert workers_of_this_process() == []


def test_blocks_leave_nothing_in_the_file_system(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while they wait nor after a killed worker: their memory has no name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = set(os.listdir("/dev/shm"))
    reader = open_reader(
        paths, num_workers=2, prepare=lambda example: torch.zeros(1 << 20), end_epoch=None
    )
    reader.read()
    workers_of_this_process()[0].kill()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert set(os.listdir("/dev/shm")) <= before
    reader.close()


def test_closing_is_quick_while_workers_wait_with_full_pipes(paths: list[str]) -> None:
    reader = open_reader(paths, num_workers=2, prepare=heavy, end_epoch=None)
    reader.read()
    start = time.monotonic()
    reader.close()
    assert time.monotonic() - start < 2


def test_a_forked_process_that_drops_the_reader_does_not_stop_the_workers(
    paths: list[str],
) -> None:
    reader = open_reader(paths, num_workers=2)
    first = reader.read()
    child = os.fork()
    if child == 0:
        reader.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert len(workers_of_this_process()) == 2
    assert first is not None and reader.read() is not None
    reader.close()


SCRIPT = """
import sys
from support.endings import come_to
from test_worker_failures import heavy, open_reader
reader = open_reader(sys.argv[2:], num_workers=2, prepare=heavy, end_epoch=None)
for _ in range(5):
    reader.read()
come_to(sys.argv[1], reader.read)
"""


@pytest.mark.parametrize("end", EARLY_ENDS)
def test_no_worker_outlives_the_interpreter(paths: list[str], end: str) -> None:
    """With workers that wait for full pipes to drain."""
    assert_no_worker_outlives(SCRIPT, end, paths, num_workers=2)
