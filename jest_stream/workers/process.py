"""Starts, watches and ends worker processes; holds both sides of each.

A `Task` travels to the process and runs there, with a socket to the training process. Workers share
nothing with each other: with a queue for all, a worker killed while writing would leave the reader
waiting. A socket ends when its worker does, and the next message is known to come from its lane's
owner. `Worker` is the training process's side and runs in its training thread.
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
from typing import Any, NamedTuple, Protocol

import torch
import torch.multiprocessing

from jest_stream.errors import ConfigError, StalledError, WorkerDiedError
from jest_stream.workers.transport import Message, receive
from jest_stream.workers.watch import Activity, WorkerStatus, end_with_parent

_STOP_TIMEOUT_S = 3.0
# Terminals and schedulers send these to every process of a job, to interrupt it or have it save a
# checkpoint. The training process answers them; a worker inherits its handlers, and ignores them.
_FOR_TRAINING = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class Task(Protocol):
    """The work of one worker process. Travels to it."""

    def run(self, parent: ParentConnection, status: WorkerStatus) -> None:
        """Works until `parent.wants_more` is False; notes each example before it is begun."""


class Job(NamedTuple):
    """A task, and the words for it in messages."""

    name: str
    """The worker's name in messages, such as "worker 0 of 2"."""
    task: Task
    describe: Callable[[Activity | None], str]
    """Says in messages how the worker is occupied, by its last note. Stays in this process."""


class Worker:
    """A worker process, as the training process sees it. Owns the process and two descriptors.

    Args:
      context: of `torch.multiprocessing`, with the start method.
      job: its work and name.
    """

    def __init__(self, context: Any, job: Job) -> None:
        self._name = job.name
        self._describe = job.describe
        self._status = WorkerStatus()
        self._connection, self._theirs = socket.socketpair()
        # Every wait of the training process has a time limit; a blocking read would have none.
        self._connection.setblocking(False)
        self._method = context.get_start_method()
        ours = self._connection if self._method == "fork" else None
        self._process = context.Process(
            target=work,
            args=(self._theirs, ours, self._status, job.task),
            name=f"jest_stream {job.name}",
        )
        self._process.daemon = True  # multiprocessing ends it at exit, if nobody did before

    def start(self) -> None:
        """Starts the process. Its owner must know it before, to `join` it even if this fails.

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
          WorkerDiedError: if it is gone, with the example it was at.
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
        """Sends a message that is not inline. To a worker that is gone it sends nothing.

        The `receive` that waits for the answer then raises.
        """
        try:
            message.send(self._connection)
        except ConnectionError:
            pass

    def ask_to_stop(self) -> None:
        """Asks the process to end."""
        if self._has_process:
            self._process.terminate()

    def join(self, deadline: float) -> None:
        """Waits until the process is gone, not beyond `deadline`, and lets go of descriptors.

        May be called again.
        """
        if self._has_process:
            self._process.join(max(deadline - time.monotonic(), 0))
            # SIGTERM waits for the interpreter, which may hang in C code; SIGKILL does not.
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
        occupation = self._describe(self._status.activity)
        return f"{self._name} (process {self._process.pid}), which {occupation},"

    def _check(self, cause: BaseException) -> None:
        """Raises `WorkerDiedError` if the process is gone; else the error is ours."""
        self._process.join(_STOP_TIMEOUT_S)
        status = self._process.exitcode
        if status is None:
            return
        # The reason is guessed by how the process ended. There are five cases:
        # 1. It exited by itself. 2. A signal ended it. 3. It never ran our code: a main script
        # without a guard. 4. SIGKILL: the system's memory killer sends it. 5. SIGSEGV: a crash.
        how, why = f"ended with status {status}", "A transform that calls exit?"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            why = "Look for the reason in the system log."
        elif not self._status.has_begun and self._method != "fork":
            how, why = f"{how} before it began", _GUARD
        if status == -signal.SIGKILL:
            why = "Often the system is out of memory: use fewer workers or a smaller super-batch."
        elif status == -signal.SIGSEGV:
            why = "A library crashed: look at that example, and at what decodes it."
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
    # All are asked first and waited for then: together they have 3 s, not each of them.
    try:
        for worker in workers:
            worker.ask_to_stop()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for worker in workers:
            worker.join(deadline)
    except BaseException:  # Ctrl-C: a deadline of 0 kills those that are left
        for worker in workers:
            worker.join(0)
        raise
    finally:
        workers.clear()


def start_workers(workers: list[Worker], jobs: Sequence[Job]) -> None:
    """Starts a process for each job and puts it into `workers`, whose owner stops them all.

    Raises:
      ConfigError: if a task cannot be sent to a process, as some start methods need.
      WorkerDiedError: if one cannot be started.
    """
    context = torch.multiprocessing.get_context()
    if context.get_start_method() != "fork":
        _require_picklable(jobs[0].task)
    for job in jobs:
        # In the list before it starts: an interrupt in between must not lose a running process.
        workers.append(Worker(context, job))
        workers[-1].start()


class ParentConnection:
    """The connection to the training process, in a worker.

    Args:
      connection: a blocking socket.
      is_stopped: tells whether this process was asked to end.
    """

    def __init__(self, connection: socket.socket, is_stopped: Callable[[], bool]) -> None:
        self.connection = connection
        """The socket to the training process."""
        self._is_stopped = is_stopped
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    @property
    def wants_more(self) -> bool:
        """Tells whether the worker is to go on."""
        return not self._is_stopped()

    def wait(self) -> None:
        """Waits until the training process has sent something, or has closed the connection."""
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
    """Runs the task of a worker process, until it is stopped. The process begins here.

    Args:
      connection: to the training process.
      inherited: the other end of it, where the worker was forked.
      status: where the task notes its examples.
      task: the work.
    """
    is_stopped = False
    if inherited is not None:
        inherited.close()  # the connection ends when the training process lets go of it

    def leave(*_: object) -> None:
        """Unwinds the task, which then closes its files."""
        nonlocal is_stopped
        is_stopped = True  # SystemExit alone may be swallowed: Cython's imports do
        sys.exit()

    signal.set_wakeup_fd(-1)  # inherited, it would tell an event loop of the training process
    signal.signal(signal.SIGTERM, leave)
    for number in _FOR_TRAINING:
        signal.signal(number, signal.SIG_IGN)
    # Inherited objects are never collected here: their destructors may touch the GPU.
    gc.freeze()
    torch.set_num_threads(1)  # the workers share the cores among them
    status.begin()
    # A thread looks, since the task itself may hang, in a transform for example.
    end_with_parent()
    task.run(ParentConnection(connection, lambda: is_stopped), status)


def _require_picklable(task: object) -> None:
    """Raises unless the task can be sent to a process that is not forked."""
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
