"""What was chosen, for those who need it on the device and for those who need it on the host.

`pack` puts the tensors of a `Selection` into one row of bytes, so that one copy brings them home.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from jest_stream.types import Selection


class Timer(Protocol):
    """An event that times are taken from, as `torch.cuda.Event`."""

    def elapsed_time(self, end_event: Timer) -> float:
        """Returns the milliseconds up to a later one."""


Marks = list[tuple[str, Timer, Timer]]
"""Stages, each with its beginning and its end."""


class Part(NamedTuple):
    """One tensor of a `Selection` within the bytes of all of them."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int
    stop: int


class Choice:
    """Which candidates were chosen from a super-batch.

    Args:
      selection: on the scoring device, or what gets it when it is first needed there. Its tensors
        may be used within `Slot.handing_out` only.
      read_back: waits for it and returns it in memory of the host. None: it is there.
      has_come: tells, without a wait, whether `read_back` would not wait.
      marks: when the device worked on it.
    """

    def __init__(
        self,
        selection: Selection | Callable[[], Selection],
        *,
        read_back: Callable[[], Selection] | None = None,
        has_come: Callable[[], bool] | None = None,
        marks: Marks | None = None,
    ) -> None:
        self._on_device = selection
        self._read_back = read_back
        self._has_come = has_come
        self._known: Selection | None = None
        self._marks = marks or []

    @property
    def on_device(self) -> Selection:
        """The choice on the scoring device. For use within `Slot.handing_out`."""
        if not isinstance(self._on_device, Selection):
            self._on_device = self._on_device()
        return self._on_device

    def on_host(self) -> Selection:
        """Returns the choice where the host can read it at once. On CUDA it is waited for."""
        if self._known is None:
            self._known = self.on_device if self._read_back is None else self._read_back()
        return self._known

    def is_known(self) -> bool:
        """Returns whether `on_host` would return at once."""
        return self._known is not None or self._has_come is None or self._has_come()

    def part(self, on_device: Tensor, on_host: Tensor) -> Choice:
        """Returns some places of the draw order as a choice; what is said of all of it stays.

        Args:
          on_device: the places, on the scoring device.
          on_host: the same, on the CPU.
        """
        return Choice(
            lambda: _rows(self.on_device, on_device),  # on a device it may be too early for that
            read_back=lambda: _rows(self.on_host(), on_host),
            has_come=self.is_known,
        )

    def weights(self, device: torch.device) -> Tensor:
        """Returns the weights on `device`, in memory that nothing here writes to again."""
        weights = self.on_device.weights
        is_asynchronous = device.type != "cpu"  # towards the CPU it would be read too early
        must_copy = self._read_back is not None  # the next choice will lie in the same place
        return weights.to(device, non_blocking=is_asynchronous, copy=must_copy)

    def device_seconds(self) -> dict[str, float]:
        """Returns how long the device worked on it, by stage. To be called after `on_host`."""
        return {stage: begin.elapsed_time(end) / 1000 for stage, begin, end in self._marks}


def _rows(selection: Selection, rows: Tensor) -> Selection:
    return replace(
        selection,
        indices=selection.indices.index_select(0, rows),
        weights=selection.weights.index_select(0, rows),
    )


@dataclass(frozen=True)
class Packing:
    """Where each tensor of a selection lies in one row of bytes."""

    parts: Sequence[Part]
    num_bytes: int

    @classmethod
    def of(cls, selection: Selection) -> Packing:
        """Returns a packing with the widest numbers first, so that all are aligned."""
        tensors = [(field.name, getattr(selection, field.name)) for field in fields(Selection)]
        parts, start = [], 0
        for name, tensor in sorted(tensors, key=lambda entry: -entry[1].element_size()):
            stop = start + tensor.nbytes
            parts.append(Part(name, tensor.dtype, tensor.shape, start, stop))
            start = stop
        return cls(parts, start)

    def pack(self, selection: Selection, *, out: Tensor) -> None:
        """Writes the selection's bytes to `out`: one kernel."""
        rows = [getattr(selection, part.name).reshape(-1) for part in self.parts]
        torch.cat([row.view(torch.uint8) for row in rows], out=out)

    def unpack(self, packed: Tensor) -> Selection:
        """Returns the selection whose tensors lie in these bytes: no copies."""
        return Selection(
            **{
                part.name: packed[part.start : part.stop].view(part.dtype).reshape(part.shape)
                for part in self.parts
            }
        )
