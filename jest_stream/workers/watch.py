"""Signs of life of a worker, for messages: its last activity, and its stacks when it hangs.

`WorkerStatus` is written by a worker and read by the training process, also when the worker is gone
or hangs in C code, with or without the interpreter's lock. `Watchdog` is for reading in this
process: a thread that sleeps, and logs all stacks when a read takes too long. `end_with_parent`
starts a thread in a worker. Neither of the first two ends anything.
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
_STACKS_AT = 4096
_MAX_STACKS_BYTES = 1 << 20
_STACKS_TIMEOUT_S = 2.0
_QUIET_S = 0.2  # without another byte: the stacks are complete


class Activity(NamedTuple):
    """The example that a worker is busy with, in the numbers of its task."""

    number: int
    """Of the shard that is read, or of the step whose train views are made."""
    position: int
    """Of the example within it."""


class WorkerStatus:
    """Last activity of a worker, and its stacks when asked. Owns a descriptor of shared memory.

    Three numbers lie at the start of the memory, the text of the stacks from byte 4,096 on.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._memory = new_memory() if descriptor is None else io.FileIO(descriptor, "r+")

    def begin(self) -> None:
        """In the worker: says that it runs, and shows its stacks when it crashes or is asked."""
        os.pwrite(self._memory.fileno(), _ACTIVITY.pack(1, -1, 0), 0)
        os.lseek(self._memory.fileno(), _STACKS_AT, os.SEEK_SET)
        # Written in C, by the signal handler: also while the interpreter hangs in a library.
        faulthandler.enable(file=self._memory.fileno())
        faulthandler.register(
            _SHOW_STACKS, file=self._memory.fileno(), all_threads=True, chain=False
        )

    def put(self, number: int, position: int) -> None:
        """In the worker: notes the activity that begins; 0.5 us."""
        os.pwrite(self._memory.fileno(), _ACTIVITY.pack(1, number, position), 0)

    @property
    def has_begun(self) -> bool:
        """Whether the worker has ever run."""
        return len(os.pread(self._memory.fileno(), 1, 0)) > 0

    @property
    def activity(self) -> Activity | None:
        """The last activity of the worker; None before the first."""
        data = os.pread(self._memory.fileno(), _ACTIVITY.size, 0)
        if not data:
            return None
        _, number, position = _ACTIVITY.unpack(data)
        return None if number < 0 else Activity(number, position)

    @property
    def last_stacks(self) -> str:
        """The stacks that were asked for, or that a crash left; empty if there are none."""
        data = os.pread(self._memory.fileno(), _MAX_STACKS_BYTES, _STACKS_AT)
        return f"Its stacks:\n{data.decode('utf-8', 'replace').rstrip()}" if data else ""

    def stacks(self, pid: int) -> str:
        """Returns the Python stacks of all threads of the worker, or why there are none."""
        if not self.has_begun:
            return "It had not begun to run Python code of ours."
        os.kill(pid, _SHOW_STACKS)
        # faulthandler says no "end": the text is complete once nothing was added for 0.2 s.
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
        """Pickles it for a process that is being started, and was not forked."""
        return _reopened, (multiprocessing.reduction.DupFd(self._memory.fileno()),)


class Watchdog:
    """Logs all stacks of this process when a read takes longer than `timeout_s`.

    A context manager around each read; `close` ends its thread. The thread only reads two
    attributes, which the reading thread sets, so it needs no lock.
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
        if self._thread.ident is None:  # not in the constructor: its caller may never close this
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
    """Ends this process, from now on, once its parent is gone: a killed one cannot say so.

    The connection does not tell it either: another worker may have inherited the other end.
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
    """Returns the state of a process in words, such as stopped or waiting for a disk."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "it cannot be told why"
    known = {"T": "it is stopped (SIGSTOP?)", "D": "it waits for a disk or network drive (state D)"}
    return known.get(letter, f"it is in state {letter}")


def _reopened(descriptor: Any) -> WorkerStatus:
    return WorkerStatus(descriptor.detach())
