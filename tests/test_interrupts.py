"""Ctrl-C may come between any two lines, other signals at any time: nothing is lost by it.

pytest tests/test_interrupts.py
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
from support.leaks import children, no_leaks, nothing_left_behind  # noqa: F401
from support.models import flipped, tiny_dataset

import jest_stream
from jest_stream import JESTDataset

pytestmark = pytest.mark.usefixtures("no_leaks")

PACKAGE = Path(jest_stream.__file__).parent
SCHEDULE = ("pipeline/schedule.py", "pipeline/batches.py", "pipeline/super_batches.py")
WORKERS = ("workers/process.py", "workers/transport.py", "workers/watch.py", "sources/reader.py")

SHARDS = {"num_shards": 4, "examples_per_shard": 17}


COUNTED = ("steps", "samples_read", "samples_scored", "samples_trained", "epoch_tail")

NUM_LINES = 100  # of the schedule, at least, in a call that reads and scores anew


class CtrlC:
    """Raises `KeyboardInterrupt` at the n-th line of some files that runs here; once."""

    def __init__(self, nth: int, files: tuple[str, ...] = SCHEDULE) -> None:
        self.num_left = nth
        self.files = {str(PACKAGE / name) for name in files}
        self.process = os.getpid()

    def __enter__(self) -> CtrlC:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in self.files or os.getpid() != self.process:
            return None
        if event == "line":
            self.num_left -= 1
            if self.num_left == 0:
                raise KeyboardInterrupt
        return self._trace


class Loop:
    """Draws one batch after the other, over the ends of epochs; keeps their keys."""

    def __init__(self, dataset: JESTDataset) -> None:
        self.dataset = dataset
        self.iterator = iter(dataset)
        self.keys: list[list[str]] = []

    def draw(self, ctrl_c: CtrlC | None = None) -> None:
        with ctrl_c or nullcontext():
            batch = next(self.iterator, None)
        if batch is None:
            self.iterator = iter(self.dataset)
            batch = next(self.iterator)
        self.keys.append(batch["key"])


@pytest.mark.parametrize(
    "options",
    [{"repeat": False}, {"steps_per_epoch": 3, "lookahead": 2, "train_transform": flipped}],
    ids=["passes", "late views"],
)
def test_ctrl_c_in_any_line_of_the_schedule_loses_and_repeats_nothing(
    shards: list[str], options: dict[str, Any]
) -> None:
    """Each call is interrupted one line later than the one before, and made again."""
    with tiny_dataset(shards, **options) as dataset:
        loop, num_interrupts = Loop(dataset), 0
        for nth in range(1, NUM_LINES):
            try:
                loop.draw(CtrlC(nth))
            except KeyboardInterrupt:
                num_interrupts += 1
                if num_interrupts % 2:  # as by a script that saves its state and is run again
                    dataset.load_state_dict(dataset.state_dict())
                loop.draw()
        counted = {name: dataset.metrics()[name] for name in COUNTED}
    assert num_interrupts > NUM_LINES / 2
    with tiny_dataset(shards, **options) as dataset:
        uninterrupted = Loop(dataset)
        while len(uninterrupted.keys) < len(loop.keys):
            uninterrupted.draw()
        assert uninterrupted.keys == loop.keys
        assert counted == {name: dataset.metrics()[name] for name in COUNTED}


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # closed when dropped
def test_ctrl_c_in_any_line_that_starts_a_worker_leaves_nothing(shards: list[str]) -> None:
    num_interrupts = 0
    for nth in range(1, NUM_LINES):
        with nothing_left_behind(), tiny_dataset(shards, num_workers=1) as dataset:
            try:
                with CtrlC(nth, WORKERS):
                    next(iter(dataset))
            except KeyboardInterrupt:
                num_interrupts += 1
    assert num_interrupts > NUM_LINES / 2


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_ctrl_c_in_any_line_that_stops_workers_leaves_nothing(shards: list[str]) -> None:
    """It may come again, while the first one is being dealt with."""
    num_interrupts = 0
    options: dict[str, Any] = {"num_workers": 1, "train_transform": flipped}
    for nth in range(1, NUM_LINES // 2):
        with nothing_left_behind(), tiny_dataset(shards, **options) as dataset:
            iterator = iter(dataset)
            next(iterator)
            try:
                with CtrlC(nth, (*WORKERS, "views/late.py")):
                    dataset.close()
            except KeyboardInterrupt:
                num_interrupts += 1
    assert num_interrupts > NUM_LINES / 4


def test_signals_for_the_training_process_do_nothing_to_its_workers(
    shards: list[str], tmp_path: Path
) -> None:
    """Schedulers signal all processes of a job, and forked workers inherit what handles it."""
    handled = tmp_path / "handled"

    def save_checkpoint(*_: object) -> None:
        with handled.open("a") as file:
            print(os.getpid(), file=file)

    before = signal.signal(signal.SIGUSR1, save_checkpoint)
    try:
        with tiny_dataset(shards, num_workers=2) as dataset:
            iterator = iter(dataset)
            next(iterator)
            for process in [psutil.Process(), *children()]:
                process.send_signal(signal.SIGUSR1)
            for worker in children():
                worker.send_signal(signal.SIGHUP)
            assert len(list(islice(iterator, 20))) == 20
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert handled.read_text().split() == [str(os.getpid())]


def test_ending_workers_does_not_tell_an_event_loop_to_terminate(shards: list[str]) -> None:
    told: list[str] = []

    async def train() -> None:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, told.append, "to terminate")
        loop.add_signal_handler(signal.SIGUSR1, arrived.set)
        with tiny_dataset(shards, num_workers=2) as dataset:
            next(iter(dataset))
        os.kill(os.getpid(), signal.SIGUSR1)  # comes after any signal from the workers
        await arrived.wait()

    asyncio.run(train())
    assert told == []


PROGRAM = """
import sys, threading
sys.path.insert(0, {tests!r})
from support.models import to_tensor, tokenize
from jest_stream import JESTDataset, SelectionConfig

def hang_soon(image, left=[9]):
    left[0] -= 1
    return to_tensor(image) if left[0] > 0 else threading.Event().wait()

dataset = JESTDataset({shards!r}, transform=hang_soon, tokenizer=tokenize, batch_size=4,
                      selection=SelectionConfig(method="uniform"), num_workers=2)
iterator = iter(dataset)
next(iterator)
print("reads", flush=True)
next(iterator), next(iterator), next(iterator), next(iterator)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_that_hang_end_with_a_training_process_that_is_killed(
    shards: list[str], number: signal.Signals
) -> None:
    program = PROGRAM.format(tests=str(Path(__file__).parent), shards=shards)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as training:
        assert training.stdout is not None and training.stdout.readline() == b"reads\n"
        workers = psutil.Process(training.pid).children()
        training.send_signal(number)
        assert training.wait(5) == -number
        _, alive = psutil.wait_procs(workers, timeout=5)
        assert len(workers) == 2 and alive == []
