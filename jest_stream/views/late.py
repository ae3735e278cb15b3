"""Makes the train views of the chosen ahead of time, as soon as the choice is known.

In: the chosen of a super-batch. Out, when its turn comes: their views. They are made in separate
worker processes, each of which takes every n-th of the chosen; or, without any, in this process
when they are due. The views are the same either way. The training thread makes all calls.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from jest_stream.views.columns import Columns, View, require_same_fields, view_of
from jest_stream.views.train import ARGUMENT, TrainView
from jest_stream.workers import (
    Activity,
    Failure,
    Finalizer,
    Job,
    Message,
    ParentConnection,
    Watchdog,
    Worker,
    WorkerStatus,
    WorkerTraceback,
    failure_message,
    start_workers,
    stop_workers,
)

# Batches that may be with the workers at once: each holds descriptors until it is taken.
_MAX_SENT = 16


@dataclass(frozen=True, kw_only=True)
class ViewRequest:
    """One worker's share of a batch: examples on their way to it, views on their way back."""

    step: int
    """Step of the batch."""
    positions: range
    """Positions of these examples in the batch."""
    items: Columns
    """Columns of the chosen; on the way back, of their views."""


@dataclass(frozen=True, kw_only=True)
class MakeTask:
    """The task of a worker that makes train views. Travels to it."""

    view: TrainView

    def run(self, parent: ParentConnection, status: WorkerStatus) -> None:
        """Answers each request with the views, or with the error that prevented them."""
        while parent.wants_more:
            request: ViewRequest = parent.receive()
            place = 0

            def note(step: int, position: int) -> None:
                """Tells the training process which view is made next."""
                nonlocal place
                place = position
                status.put(step, position)

            try:
                views = self.view(
                    request.items, step=request.step, positions=request.positions, note=note
                )
                made = ViewRequest(step=request.step, positions=request.positions, items=views)
                message = Message(made)
            except Exception as error:
                message = failure_message(error, position=place)
            try:
                message.send(parent.connection)
            except OSError:  # nobody waits for it any more
                sys.exit(1)


class LateViews:
    """Makes the train views of chosen examples. Owns the worker processes.

    Args:
      view: makes the views of some examples.
      num_workers: processes. 0: this one makes them.
      timeout_s: longest wait for a worker; when making them here takes longer, it is logged.
    """

    def __init__(self, view: TrainView, *, num_workers: int, timeout_s: float) -> None:
        self._view = view
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._chosen: dict[int, Columns] = {}  # by step: the chosen whose views were not yet taken
        self._sent: set[int] = set()  # those of these steps that the workers have
        self._workers: list[Worker] = []
        self._watchdog: Watchdog | None = None  # while views are made here
        self._stop: Finalizer | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of the chosen that `start` takes."""
        return self._view.columns

    def has(self, step: int) -> bool:
        """Returns whether the views of a step were asked for."""
        return step in self._chosen

    def start(self, chosen: Columns, *, step: int) -> None:
        """Asks for the views of a step; the workers begin at once.

        Errors are raised by `take`, except where workers cannot be started.

        Raises:
          ConfigError: if the train transform cannot be sent to a worker process.
          WorkerDiedError: if a worker cannot be started.
        """
        self._chosen[step] = chosen
        self._send()

    def take(self, step: int) -> View:
        """Returns the views of a step that was asked for, on the CPU, and forgets it.

        After an error the views are still to be had: the next call makes them anew.

        Raises:
          WorkerDiedError: for a worker process that is gone.
          StalledError: for one that gave nothing for `timeout_s`.
          BadExampleError: for an image that cannot be decoded.
          Exception: any error of the train transform, with its own type.
        """
        try:
            self._send()
            view = self._receive(step) if self._workers else self._make_here(step)
        except BaseException:
            self.pause()
            raise
        self._sent.discard(step)
        del self._chosen[step]
        return view

    def open(self) -> None:
        """Starts the workers, if they do not run."""
        if self._stop is not None:
            return
        if self._num_workers == 0:
            self._watchdog = Watchdog(self._timeout_s, "making train views")
            # Also runs when this object is dropped, and at interpreter exit.
            self._stop = Finalizer(self, self._watchdog.close)
            return
        self._stop = Finalizer(self, stop_workers, self._workers, os.getpid())
        jobs = [
            Job(
                f"train view worker {number} of {self._num_workers}",
                MakeTask(view=self._view),
                partial(_describe, self._chosen),
            )
            for number in range(self._num_workers)
        ]
        try:
            start_workers(self._workers, jobs)
        except BaseException:
            self.pause()
            raise

    def pause(self) -> None:
        """Stops the workers. Views that were asked for are made anew when they are next needed."""
        self._sent.clear()
        self._watchdog = None
        if self._stop is not None:
            self._stop()
            self._stop = None

    def forget(self) -> None:
        """Stops the workers and forgets the views that were asked for."""
        self.pause()
        self._chosen.clear()

    def _send(self) -> None:
        """Hands the workers the steps that they have not got, the earliest first."""
        self.open()
        if not self._workers:
            return
        try:
            for step in sorted(self._chosen.keys() - self._sent):
                if len(self._sent) >= _MAX_SENT:
                    return
                # In memory of their own: sending never waits for a worker that is itself waiting
                # until this process takes its answer.
                for worker, request in zip(self._workers, self._requests(step), strict=True):
                    worker.send(Message(request, is_inline=False))
                self._sent.add(step)
        except BaseException:
            self.pause()
            raise

    def _requests(self, step: int) -> list[ViewRequest]:
        """Returns the shares of the workers."""
        # Every n-th each: of 10 examples, 3 workers take (0, 3, 6, 9), (1, 4, 7) and (2, 5, 8).
        chosen, num_workers = self._chosen[step], len(self._workers)
        return [
            ViewRequest(
                step=step,
                positions=range(number, len(chosen["key"]), num_workers),
                items={name: column[number::num_workers] for name, column in chosen.items()},
            )
            for number in range(num_workers)
        ]

    def _receive(self, step: int) -> View:
        # Each worker answers in the order of the requests: its next message is of this step.
        messages = [worker.receive(self._timeout_s) for worker in self._workers]
        failures = [m for m in messages if isinstance(m, Failure)]
        if failures:
            # The error of the earliest example, as without workers.
            first = min(failures, key=lambda failure: failure.position)
            try:
                raise first.error from WorkerTraceback(first.traceback)
            finally:
                del messages, failures, first  # the error's traceback holds this frame
        assert all(made.step == step for made in messages)
        return _joined([made for made in messages if made.positions], self._chosen[step])

    def _make_here(self, step: int) -> View:
        assert self._watchdog is not None
        chosen = self._chosen[step]
        with self._watchdog:
            views = self._view(chosen, step=step, positions=range(len(chosen["key"])))
        return view_of(views, "image")


def _joined(parts: list[ViewRequest], chosen: Columns) -> View:
    """Returns the views of all workers in the order of the batch; each is copied once."""
    keyed = [{"key": chosen["key"][part.positions.start :], **part.items} for part in parts]
    require_same_fields(keyed, argument=ARGUMENT)
    num_rows = len(chosen["key"])
    joined: Columns = {}
    for name, first in parts[0].items.items():
        assert isinstance(first, Tensor)
        column = first.new_empty((num_rows, *first.shape[1:]))
        for part in parts:
            column[part.positions.start :: part.positions.step] = part.items[name]
        joined[name] = column
    return view_of(joined, "image")


def _describe(chosen: dict[int, Columns], activity: Activity | None) -> str:
    if activity is None:
        return "makes train views"
    step, position = activity
    of_step = chosen.get(step)
    if of_step is None:
        return f"makes train views, last that of step {step}"
    return (
        f"makes train views, last example {of_step['key'][position]!r} of shard "
        f"{of_step['shard'][position]!r}"
    )
