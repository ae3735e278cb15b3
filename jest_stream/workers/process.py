"""Worker processes, from both sides: they are started, watched and ended here.

In: a `Job` for each process; its task travels there and runs. Out: messages over one socket per
worker. Workers share nothing, so a worker that is killed at any moment ends its own socket and
leaves no lock or queue that the others wait for. No threads but the one of `end_with_parent`.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
import torch.multiprocessing

from jest_stream.errors import ConfigError, StalledError, WorkerDiedError
from jest_stream.workers.transport import Message, receive
from jest_stream.workers.watch import Activity, WorkerStatus, end_with_parent

_STOP_TIMEOUT_S = 3.0
# Terminals and schedulers send these to every process of a job, to interrupt it or have it save a
# checkpoint. They are for the training process, whose handlers a worker inherits.
_FOR_TRAINING = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Task(Protocol):
    """The work of a worker process. Travels to it."""

    def run(self, parent: ParentConnection, status: WorkerStatus) -> None:
        """Works until `parent.wants_more` is False; keeps `status` up to date."""


class Job(NamedTuple):
    """A task with the words that messages use of its worker."""

    name: str
    """Name of the worker, such as "worker 0 of 2"."""
    task: Task
    describe: Callable[[Activity | None], str]
    """Returns "reads lanes 0, 2, ..." with the last activity. Stays in this process."""


class Worker:
    """A worker process, as the training process sees it. Owns the process and two descriptors.

    Args:
      context: of `torch.multiprocessing`, with the start method.
      job: the task and its names.
    """

    def __init__(self, context: Any, job: Job) -> None:
        self._name = job.name
        self._describe = job.describe
        self._status = WorkerStatus()
        self._connection, self._theirs = socket.socketpair()
        self._connection.setblocking(False)
        self._method = context.get_start_method()
        ours = self._connection if self._method == "fork" else None
        self._process = context.Process(
            target=work,
            args=(self._theirs, ours, self._status, job.task),
            name=f"jest_stream {job.name}",
        )
        self._process.daemon = True

    def start(self) -> None:
        """Starts the process. Its owner must be able to `join` it before this is called.

        Raises:
          WorkerDiedError: if it cannot be started.
        """
        try:
            self._process.start()
        except EOFError as error:  # of the fork server, which imports the main script
            raise WorkerDiedError(f"{self._name} could not be started. {_GUARD}") from error
        finally:
            self._theirs.close()  # the connection ends when the worker does

    def receive(self, timeout_s: float) -> Any:
        """Returns the worker's next message.

        Raises:
          WorkerDiedError: if it is gone, with its last activity.
          StalledError: if it gave nothing for `timeout_s`, with its stacks.
        """
        try:
            return receive(self._connection, self._process.sentinel, timeout_s)
        except TimeoutError:
            raise StalledError(
                f"{self._title()} gave nothing for timeout_s={timeout_s:g} seconds. A transform "
                "that hangs, or storage that does? If it is only slow, raise timeout_s or use "
                f"more workers. {self._status.stacks(self._process.pid)}"
            ) from None
        except (EOFError, ConnectionError) as error:
            self._check(error)
            raise

    def acknowledge(self) -> None:
        """Tells the worker that one of its messages was taken.

        Raises:
          WorkerDiedError: if it is gone.
        """
        try:
            self._connection.send(b"\0")
        except ConnectionError as error:
            self._check(error)
            raise

    def send(self, message: Message) -> None:
        """Sends a message made with `is_inline=False`, and forgets it if the worker is gone.

        The `receive` that waits for the worker's answer then says so.
        """
        try:
            message.send(self._connection)
        except ConnectionError:
            pass

    def ask_to_stop(self) -> None:
        """Sends SIGTERM, which interrupts the task where it is."""
        if self._has_process:
            self._process.terminate()

    def join(self, deadline: float) -> None:
        """Waits for the end of the process, kills it at `deadline`, and closes the descriptors.

        May be called again.
        """
        if self._has_process:
            self._process.join(max(deadline - time.monotonic(), 0))
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join(_STOP_TIMEOUT_S)  # one that waits for a disk ends later
        self._theirs.close()
        self._status.close()
        self._connection.close()
        if not self._has_process or self._process.exitcode is not None:
            self._process.close()

    @property
    def _has_process(self) -> bool:
        try:
            return self._process.pid is not None
        except ValueError:  # it was closed
            return False

    def _title(self) -> str:
        work = self._describe(self._status.activity)
        return f"{self._name} (process {self._process.pid}), which {work},"

    def _check(self, cause: BaseException) -> None:
        """Raises if the process is gone; else the error is ours."""
        self._process.join(_STOP_TIMEOUT_S)
        if self._process.exitcode is not None:
            self._raise_died(cause)

    def _raise_died(self, cause: BaseException) -> NoReturn:
        exit_code = self._process.exitcode
        how, why = f"ended with status {exit_code}", "A transform that calls exit?"
        if exit_code < 0:
            how = f"was killed by {signal.Signals(-exit_code).name}"
            why = "Look for the reason in the system log."
        elif not self._status.has_begun and self._method != "fork":
            how, why = f"{how} before it began", _GUARD
        if exit_code == -signal.SIGKILL:
            why = "Often the system is out of memory: use fewer workers or a smaller super-batch."
        elif exit_code == -signal.SIGSEGV:
            why = "A library crashed: look at that example, and at its decoder."
        text = f"{self._title()} {how}. {why} {self._status.last_stacks}"
        raise WorkerDiedError(text.rstrip()) from cause


_GUARD = (
    "Where workers are not forked, each imports the main script anew, and must not start the "
    'training again: put the body of the script under if __name__ == "__main__":, or see above for '
    "the error of that import."
)


class Finalizer:
    """Calls a function once: when called, when its owner is dropped, or at interpreter exit.

    Unlike `weakref.finalize` it can be called again if the call was interrupted.
    """

    def __init__(self, owner: object, function: Callable[..., object], *arguments: object) -> None:
        self._finalize = weakref.finalize(owner, function, *arguments)

    def __call__(self) -> None:
        if found := self._finalize.peek():
            _, function, arguments, _ = found
            function(*arguments)
            self._finalize.detach()


def stop_workers(workers: list[Worker], owner_pid: int) -> None:
    """Ends all workers; does nothing in a process that was forked off their owner."""
    if os.getpid() != owner_pid:
        return
    try:
        for worker in workers:  # all are asked before the first is waited for
            worker.ask_to_stop()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for worker in workers:
            worker.join(deadline)
    except BaseException:  # Ctrl-C: those that are left are killed
        for worker in workers:
            worker.join(0)
        raise
    finally:
        workers.clear()


def start_workers(workers: list[Worker], jobs: Sequence[Job]) -> None:
    """Starts a process for each job and appends it to `workers`, whose owner stops them.

    Each is appended before it is started: Ctrl-C in between leaves none that nobody stops.

    Raises:
      ConfigError: if a task cannot be sent to a process, as some start methods need.
      WorkerDiedError: if one cannot be started.
    """
    context = torch.multiprocessing.get_context()
    if context.get_start_method() != "fork":
        _require_picklable(jobs[0].task)
    for job in jobs:
        workers.append(Worker(context, job))
        workers[-1].start()


class ParentConnection:
    """The training process, as a worker sees it.

    Args:
      connection: the socket to it; blocks.
      is_stopped: whether this process was asked to end.
    """

    def __init__(self, connection: socket.socket, is_stopped: Callable[[], bool]) -> None:
        self.connection = connection
        self._is_stopped = is_stopped
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    @property
    def wants_more(self) -> bool:
        """Whether the worker is to go on."""
        return not self._is_stopped()

    def wait(self) -> None:
        """Returns when the training process has sent something, or has closed the connection."""
        self._poll.poll()

    def receive(self) -> Any:
        """Returns the next message of the training process; exits when it is gone."""
        self.wait()
        try:
            return receive(self.connection, None, 60.0)
        except (EOFError, OSError):
            sys.exit(1)


def work(
    connection: socket.socket, inherited: socket.socket | None, status: WorkerStatus, task: Task
) -> None:
    """Runs a task in a worker process, until it is stopped.

    Args:
      connection: the socket to the training process.
      inherited: its other end, where the worker was forked.
      status: shared with the training process.
      task: the work.
    """
    is_stopped = False
    if inherited is not None:
        inherited.close()  # the connection ends when the training process lets go of it

    def leave(*_: object) -> None:
        """Unwinds the task, which closes its files."""
        nonlocal is_stopped
        is_stopped = True  # the exit raised here may be swallowed: Cython's imports do
        sys.exit()

    signal.set_wakeup_fd(-1)  # inherited, it would tell an event loop of the training process
    signal.signal(signal.SIGTERM, leave)
    for number in _FOR_TRAINING:
        signal.signal(number, signal.SIG_IGN)
    # Inherited objects are never collected here: their destructors may touch the GPU.
    gc.freeze()
    torch.set_num_threads(1)
    status.begin()
    end_with_parent()  # from a thread: the task may hang in a transform
    task.run(ParentConnection(connection, lambda: is_stopped), status)


def _require_picklable(task: object) -> None:
    """Raises `ConfigError` for a task that cannot travel to a process that is not forked."""
    try:
        ForkingPickler.dumps(task)
    except Exception as error:
        method = torch.multiprocessing.get_start_method()
        raise ConfigError(
            f"the source or a transform, tokenizer or key cannot be sent to a worker process "
            f"({type(error).__name__}: {error}), as the start method {method!r} needs. Define it "
            "at the top level of a module instead of a lambda or inner function, or pass "
            "num_workers=0."
        ) from error
