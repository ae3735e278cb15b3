"""Watches over workers and reads: notes the example at hand, and shows the stacks of a hang.

A worker keeps its `WorkerStatus`; the training process reads it, even of a worker that is gone or
hangs in C code, with or without the interpreter's lock. `Watchdog` watches reading in the training
process: a thread that sleeps, and logs all stacks when a read takes too long. Neither ends a
process, but `end_with_parent` has a worker end when the training process is gone.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import multiprocessing.reduction
import os
import signal
import struct
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from jest_stream.workers.transport import new_memory

_LOG = logging.getLogger("jest_stream")

# A signal that schedulers and runtimes have no use for; SIGUSR1 and SIGUSR2 have many.
_SHOW_STACKS = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
_ACTIVITY = struct.Struct("qqq")  # 1 once the worker runs, then the two of `Activity`
_STACKS_AT = 4096  # byte of the memory at which the stacks begin
_MAX_STACKS_BYTES = 1 << 20
_STACKS_TIMEOUT_S = 2.0
_QUIET_S = 0.2  # without another byte: the stacks are complete


class Activity(NamedTuple):
    """Two numbers that tell the example that a worker is busy with."""

    number: int
    """Of the shard that is read, or of the step whose train views are made."""
    position: int
    """Of the example within it."""


class WorkerStatus:
    """Shows the example that a worker reads, and its stacks on request. Owns shared memory.

    The first 24 bytes hold the numbers of the example, those from 4,096 on the stacks, written by
    faulthandler. There is no lock: 24 bytes are written in one call, by one writer.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._memory = new_memory() if descriptor is None else io.FileIO(descriptor, "r+")

    def begin(self) -> None:
        """Notes, in the worker, that it runs; has its stacks shown at a crash or on request."""
        os.pwrite(self._memory.fileno(), _ACTIVITY.pack(1, -1, 0), 0)
        os.lseek(self._memory.fileno(), _STACKS_AT, os.SEEK_SET)
        # faulthandler writes in C, in the signal handler, while the interpreter hangs or not.
        faulthandler.enable(file=self._memory.fileno())
        faulthandler.register(
            _SHOW_STACKS, file=self._memory.fileno(), all_threads=True, chain=False
        )

    def put(self, number: int, position: int) -> None:
        """Notes, in the worker, the example that comes next; takes 0.5 us."""
        os.pwrite(self._memory.fileno(), _ACTIVITY.pack(1, number, position), 0)

    @property
    def has_begun(self) -> bool:
        """Tells whether the worker has ever run."""
        return len(os.pread(self._memory.fileno(), 1, 0)) > 0

    @property
    def activity(self) -> Activity | None:
        """The example that the worker was busy with last; None before the first."""
        data = os.pread(self._memory.fileno(), _ACTIVITY.size, 0)
        if not data:
            return None
        _, number, position = _ACTIVITY.unpack(data)
        return None if number < 0 else Activity(number, position)

    @property
    def last_stacks(self) -> str:
        """The stacks requested, or left by a crash; empty if there are none."""
        data = os.pread(self._memory.fileno(), _MAX_STACKS_BYTES, _STACKS_AT)
        return f"Its stacks:\n{data.decode('utf-8', 'replace').rstrip()}" if data else ""

    def stacks(self, pid: int) -> str:
        """Returns the Python stacks of all threads of the worker, or why there are none."""
        if not self.has_begun:
            return "It had not begun to run Python code of ours."
        # The handler writes stack after stack and says nothing at the end: they are complete once
        # nothing was added for 0.2 s.
        os.kill(pid, _SHOW_STACKS)
        deadline = time.monotonic() + _STACKS_TIMEOUT_S
        text, is_quiet_at = "", deadline
        while time.monotonic() < min(deadline, is_quiet_at):
            time.sleep(0.02)
            now = self.last_stacks
            if len(now) > len(text):
                text, is_quiet_at = now, time.monotonic() + _QUIET_S
        return text or f"It does not answer signals either: {_state(pid)}."

    def close(self) -> None:
        """Lets go of the memory."""
        self._memory.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to a process that is started without a fork, as a copy of the descriptor."""
        return _reopened, (multiprocessing.reduction.DupFd(self._memory.fileno()),)


class Watchdog:
    """Logs all stacks of this process when a read takes longer than `timeout_s`.

    A context manager around each read; `close` ends its thread. The thread only reads two
    attributes, which the reading thread sets: there is no lock.
    """

    def __init__(self, timeout_s: float, title: str) -> None:
        self._timeout_s = timeout_s
        self._title = title
        self._pid = os.getpid()
        self._is_closed = threading.Event()
        self._began_at: float | None = None
        self._reader = 0
        self._thread = threading.Thread(target=self._watch, name="jest_stream watch", daemon=True)

    def __enter__(self) -> None:
        if self._thread.ident is None:  # not in the constructor: an owner must know it, to close it
            self._thread.start()
        self._reader = threading.get_ident()
        self._began_at = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._began_at = None

    def close(self) -> None:
        """Ends the thread. May be called again."""
        self._is_closed.set()
        is_here = os.getpid() == self._pid and self._thread.ident is not None
        if is_here and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        reported_at: float | None = None
        # It looks four times within the limit, so that it is at most a quarter late. One read is
        # reported once, however long it takes.
        while not self._is_closed.wait(min(self._timeout_s / 4, 1.0)):
            began_at = self._began_at
            if began_at is None or began_at == reported_at:
                continue
            if time.monotonic() - began_at > self._timeout_s:
                reported_at = began_at
                _LOG.error(
                    "%s has taken more than timeout_s=%g seconds, in this process. A transform "
                    "that hangs, or storage that does? All stacks:\n%s",
                    self._title,
                    self._timeout_s,
                    _own_stacks(self._reader),
                )


def end_with_parent() -> None:
    """Ends this process once its parent is gone: a killed parent cannot say so.

    The connection may not tell either, since another worker may have inherited its other end.
    """
    parent_pid = os.getppid()

    def watch() -> None:
        """Looks once a second."""
        while os.getppid() == parent_pid:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _own_stacks(first: int) -> str:
    """Returns the stacks of this process's threads, that of thread `first` before the others."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != first)
    return "\n".join(
        f"Thread {names.get(number, number)} (most recent call last):\n"
        + "".join(traceback.format_stack(frame))
        for number, frame in frames
        if number != threading.get_ident()
    )


def _state(pid: int) -> str:
    """Returns in words the state of a process: stopped, or waiting for a disk, perhaps."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "it cannot be told why"
    known = {"T": "it is stopped (SIGSTOP?)", "D": "it waits for a disk or network drive (state D)"}
    return known.get(letter, f"it is in state {letter}")


def _reopened(descriptor: Any) -> WorkerStatus:
    return WorkerStatus(descriptor.detach())
