"""Lists the few calls that scoring makes of a device that queues its work.

`streams` works by these calls alone: a test replaces the device by a model of one, which reports
every access that no wait orders.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A place in the work of a stream, as `torch.cuda.Event`."""

    def query(self) -> bool:
        """Returns whether the device has got there."""

    def synchronize(self) -> None:
        """Makes the host wait until the device has got there."""

    def elapsed_time(self, end_event: Any) -> float:
        """Returns the milliseconds up to a later event; both made by `Backend.mark`."""


class Stream(Protocol):
    """Work that a device does in order, as `torch.cuda.Stream`."""

    def wait_event(self, event: Any) -> None:
        """Makes all work that is queued from now on wait for the event."""

    def record_event(self) -> Any:
        """Returns an `Event` that comes when all work queued so far is done."""


class Backend(Protocol):
    """The calls that `streams` makes of a device."""

    def stream(self) -> Stream:
        """Returns a new stream of the device."""

    def current_stream(self, device: torch.device | None = None) -> Stream:
        """Returns the caller's stream on `device`; on the backend's device if that has none."""

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """Queues the block's work on the stream."""

    def mark(self, stream: Stream) -> Event:
        """Returns an event of the present, which measures the time to other such events."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns host memory that the device can copy to and from."""

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns memory of the device, allocated on the current stream."""
