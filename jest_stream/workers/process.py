"""One worker process, from both sides: how it is started, watched and ended, whatever it does.

A `Task` travels to the process and runs there, with a socket of its own to the training process.
Nothing is shared between workers: a socket ends when its worker does.
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
from jest_stream.workers.watch import Notes, Place, end_with_parent

_STOP_TIMEOUT_S = 3.0
# Terminals and schedulers send them to every process of a job, to interrupt it or have it save a
# checkpoint. That is for the training process, whose handlers a worker inherits.
_FOR_TRAINING = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Task(Protocol):
    """What a worker process does. Travels to it."""

    def run(self, parent: ParentConnection, notes: Notes) -> None:
        """Works until `parent.wants_more` is False; notes what it is at."""


class Job(NamedTuple):
    """What a worker process is started for."""

    name: str
    """How messages call the worker, such as "worker 0 of 2"."""
    task: Task
    describe: Callable[[Place | None], str]
    """For messages: what the worker does, and what it was at last. Stays in this process."""


class Worker:
    """A worker process, as the training process sees it. Owns the process and two descriptors.

    Args:
      context: of `torch.multiprocessing`, with the start method.
      job: what it does.
    """

    def __init__(self, context: Any, job: Job) -> None:
        self._name = job.name
        self._describe = job.describe
        self._notes = Notes()
        self._connection, self._theirs = socket.socketpair()
        self._connection.setblocking(False)
        self._method = context.get_start_method()
        ours = self._connection if self._method == "fork" else None
        self._process = context.Process(
            target=work,
            args=(self._theirs, ours, self._notes, job.task),
            name=f"jest_stream {job.name}",
        )
        self._process.daemon = True

    def start(self) -> None:
        """Starts the process. From before on, its owner must be able to `join` it.

        Raises:
          WorkerDiedError: if it cannot be started.
        """
        try:
            self._process.start()
        except EOFError as error:  # of the fork server, which imports the main script
            raise WorkerDiedError(f"{self._name} could not be started. {_GUARD}") from error
        finally:
            self._theirs.close()  # so that the connection ends when the worker does

    def receive(self, timeout_s: float) -> Any:
        """Returns the worker's next message.

        Raises:
          WorkerDiedError: if it is gone, with what it was at.
          StalledError: if it gave nothing for `timeout_s`, with its stacks.
        """
        try:
            return receive(self._connection, self._process.sentinel, timeout_s)
        except TimeoutError:
            raise StalledError(
                f"{self._title()} gave nothing for timeout_s={timeout_s:g} seconds. A transform "
                "that hangs, or storage that does? If it is only slow, raise timeout_s or use "
                f"more workers. {self._notes.stacks(self._process.pid)}"
            ) from None
        except (EOFError, ConnectionError) as error:
            self._check(error)
            raise

    def answer(self) -> None:
        """Tells the worker that a message of its was taken.

        Raises:
          WorkerDiedError: if it is gone.
        """
        try:
            self._connection.send(b"\0")
        except ConnectionError as error:
            self._check(error)
            raise

    def send(self, message: Message) -> None:
        """Sends a message that is in memory of its own; to a worker that is gone, nothing.

        That it is gone is said by the `receive` that waits for its answer.
        """
        try:
            message.send(self._connection)
        except ConnectionError:
            pass

    def ask_to_stop(self) -> None:
        """Lets the process end, whatever it is doing."""
        if self._has_process:
            self._process.terminate()

    def join(self, deadline: float) -> None:
        """Waits until the process is gone, not beyond `deadline`, and lets go of descriptors.

        May be called again.
        """
        if self._has_process:
            self._process.join(max(deadline - time.monotonic(), 0))
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join(_STOP_TIMEOUT_S)  # one that waits for a disk ends later
        self._theirs.close()
        self._notes.close()
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
        what = self._describe(self._notes.place)
        return f"{self._name} (process {self._process.pid}), which {what},"

    def _check(self, cause: BaseException) -> None:
        """Raises if the process is gone; else the error is ours."""
        self._process.join(_STOP_TIMEOUT_S)
        if self._process.exitcode is not None:
            self._raise_died(cause)

    def _raise_died(self, cause: BaseException) -> NoReturn:
        status = self._process.exitcode
        how, why = f"ended with status {status}", "A transform that calls exit?"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            why = "Look for the reason in the system log."
        elif not self._notes.has_begun and self._method != "fork":
            how, why = f"{how} before it began", _GUARD
        if status == -signal.SIGKILL:
            why = "Often the system is out of memory: use fewer workers or a smaller super-batch."
        elif status == -signal.SIGSEGV:
            why = "A library crashed: look at that example, and at what decodes it."
        text = f"{self._title()} {how}. {why} {self._notes.last_stacks}"
        raise WorkerDiedError(text.rstrip()) from cause


_GUARD = (
    "Where workers are not forked, each imports the main script anew, and must not start the "
    'training again: put what the script does under if __name__ == "__main__":, or see above for '
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
        for worker in workers:
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
    """Starts a process for each job and puts them into `workers`, whose owner stops them.

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
      connection: to it; blocks.
      is_stopped: whether this process was asked to end.
    """

    def __init__(self, connection: socket.socket, is_stopped: Callable[[], bool]) -> None:
        self.connection = connection
        """To the training process."""
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
    connection: socket.socket, inherited: socket.socket | None, notes: Notes, task: Task
) -> None:
    """What a worker process does: its task, until it is stopped.

    Args:
      connection: to the training process.
      inherited: the other end of it, where the worker was forked.
      notes: what it is at.
      task: what it does.
    """
    is_stopped = False
    if inherited is not None:
        inherited.close()  # the connection ends when the training process lets go of it

    def leave(*_: object) -> None:
        """Unwinds, so that nothing is left behind."""
        nonlocal is_stopped
        is_stopped = True  # what is raised here may be swallowed: Cython's imports do
        sys.exit()

    signal.set_wakeup_fd(-1)  # inherited, it would tell an event loop of the training process
    signal.signal(signal.SIGTERM, leave)
    for number in _FOR_TRAINING:
        signal.signal(number, signal.SIG_IGN)
    # What was inherited is never collected here: its destructors may touch the GPU.
    gc.freeze()
    torch.set_num_threads(1)
    notes.begin()
    # Whatever the task waits for meanwhile, such as a transform that hangs.
    end_with_parent()
    task.run(ParentConnection(connection, lambda: is_stopped), notes)


def _require_picklable(task: object) -> None:
    """Demands what starting a process needs where it is not forked."""
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
