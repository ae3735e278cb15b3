"""A read that hangs is named with its place in the data and in the code, in any process.

pytest tests/sources/test_stalls.py
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import block_readers as readers
from support.leaks import children, no_leaks
from support.shards import write_shards

from jest_stream.errors import BadExampleError, StalledError, WorkerDiedError
from jest_stream.sources.tar import TarSource
from jest_stream.types import Example
from jest_stream.workers import process

__all__ = ["no_leaks"]
pytestmark = pytest.mark.usefixtures("no_leaks")

TIMEOUT_S = 0.5
HANGING = "000005"


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """2 shards of 8 examples, one per lane."""
    return write_shards(tmp_path / "shards", num_shards=2, examples_per_shard=8, size=8)


open_reader = partial(readers.open_reader, num_lanes=2, block_size=2, num_workers=1)


def wait_for_ever() -> None:
    threading.Event().wait()


def hold_the_lock() -> None:
    """In C code, with the interpreter's lock: no other thread of the process runs."""
    ctypes.PyDLL(None).sleep(600)


def release_the_lock() -> None:
    ctypes.CDLL(None).sleep(600)


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def at_the_sixth(action: Callable[[], Any]) -> Callable[[Example], str]:
    def prepare(example: Example) -> str:
        if example["__key__"] == HANGING:
            action()
        return str(example["__key__"])

    return prepare


@pytest.mark.parametrize("hang", [wait_for_ever, hold_the_lock, release_the_lock])
def test_a_worker_that_hangs_shows_its_stacks_and_what_it_reads(
    paths: list[str], hang: Callable[[], None]
) -> None:
    reader = open_reader(TarSource(paths), prepare=at_the_sixth(hang), timeout_s=TIMEOUT_S)
    start = time.monotonic()
    with pytest.raises(StalledError) as raised:
        list(iter(reader.read, None))
    assert time.monotonic() - start < TIMEOUT_S + 7
    text = str(raised.value)
    assert f"in {hang.__name__}" in text and "in prepare" in text and "test_stalls.py" in text
    assert "in _send" in text  # the other threads too
    assert f"last example 5 of shard {paths[0]!r}" in text
    assert "timeout_s=0.5" in text
    assert children() == []


def test_a_worker_that_was_stopped_is_reported_though_it_cannot_answer(
    paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_STOP_TIMEOUT_S", 0.5)
    reader = open_reader(TarSource(paths), prepare=at_the_sixth(stop_itself), timeout_s=TIMEOUT_S)
    start = time.monotonic()
    with pytest.raises(StalledError, match=r"does not answer signals either: it is stopped"):
        list(iter(reader.read, None))
    assert time.monotonic() - start < TIMEOUT_S + 7


def test_a_worker_that_hangs_while_it_hands_over_large_blocks_is_reported(
    paths: list[str],
) -> None:
    """With megabytes half written to a socket, the training process would wait with it."""

    def prepare(example: Example) -> bytes:
        if example["__key__"] == HANGING:
            hold_the_lock()
        return bytes(8 << 20)

    reader = open_reader(TarSource(paths), prepare=prepare, timeout_s=2.0)
    blocks = []
    with pytest.raises(StalledError, match="in hold_the_lock"):
        while (block := reader.read()) is not None:
            blocks.append(block)
    # The blocks that were ready arrive; the thread that sends may not have got hold of the last.
    assert len(blocks) in (3, 4)


class Endless:
    """A source that gives two examples and then hangs, as storage does that never answers."""

    num_shards = 2
    fingerprint = "endless"

    def shard_name(self, shard: int) -> str:
        return f"shard number {shard}"

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        for number in range(index, 2):
            yield {"__key__": f"{shard}/{number}"}, 0
        wait_for_ever()


def test_storage_that_hangs_is_named_by_its_shard() -> None:
    reader = open_reader(Endless(), timeout_s=TIMEOUT_S)
    with pytest.raises(StalledError, match=r"last example 2 of shard 'shard number") as raised:
        list(iter(reader.read, None))
    assert "in read" in str(raised.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_named_with_its_shard_and_example(
    paths: list[str], number: signal.Signals
) -> None:
    reader = open_reader(
        TarSource(paths), prepare=at_the_sixth(lambda: os.kill(os.getpid(), number))
    )
    start = time.monotonic()
    with pytest.raises(WorkerDiedError, match=f"was killed by {number.name}") as raised:
        list(iter(reader.read, None))
    assert f"last example 5 of shard {paths[0]!r}" in str(raised.value)
    if number == signal.SIGSEGV:  # of which the worker could still leave word
        assert "Segmentation fault" in str(raised.value) and "in prepare" in str(raised.value)
    assert time.monotonic() - start < 10


def test_a_killed_worker_is_noticed_while_the_reader_waits_for_it() -> None:
    reader = open_reader(Endless())
    threading.Timer(0.3, lambda: [child.kill() for child in children()]).start()
    start = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"shard number .*SIGKILL"):
        list(iter(reader.read, None))
    assert time.monotonic() - start < 10


def test_a_read_that_hangs_in_this_process_is_logged_with_all_stacks(
    paths: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    was_logged = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            was_logged.set()

    def wait_until_logged() -> None:
        assert was_logged.wait(20)

    listener = Listener()
    logging.getLogger("jest_stream").addHandler(listener)
    try:
        reader = open_reader(
            TarSource(paths), prepare=at_the_sixth(wait_until_logged), num_workers=0, timeout_s=0.2
        )
        blocks = list(iter(reader.read, None))
    finally:
        logging.getLogger("jest_stream").removeHandler(listener)
    assert sum(block.num_examples for block in blocks) == 16  # and reading goes on
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "in wait_until_logged" in record.message
    assert "timeout_s=0.2" in record.message and "TarSource" in record.message


def test_reading_in_this_process_leaves_no_thread_whatever_ends_it(paths: list[str]) -> None:
    before = threading.active_count()
    reader = open_reader(TarSource(paths), num_workers=0)
    reader.read()
    assert threading.active_count() == before + 1
    reader.close()
    assert threading.active_count() == before
    reader.read()
    del reader
    assert threading.active_count() == before


UNGUARDED = """
import sys, torch.multiprocessing
torch.multiprocessing.set_start_method(sys.argv[1], force=True)
from jest_stream import TarSource
from jest_stream.sources.reader import BlockReader
from jest_stream.types import Cursor
reader = BlockReader(TarSource(sys.argv[2:]), lanes=[0], num_lanes=1, seed=0, prepare=str,
                     cursors={0: Cursor(0, 0, 0, 0)}, block_size=2, collate=list, end_epoch=1,
                     on_bad_example="raise", num_workers=1, timeout_s=60)
reader.read()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_without_a_main_guard_is_told_so(
    paths: list[str], tmp_path: Path, method: str
) -> None:
    script = tmp_path / "train.py"
    script.write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, str(script), method, *paths], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    *_, last = done.stderr.strip().splitlines()
    assert "WorkerDiedError" in last and 'if __name__ == "__main__":' in last
    assert "exit?" not in last
