"""Holds a selection that the device may still be computing, for users on device and host.

A `Selection` on the scoring device goes in; its rows of any columns come out. `Packing` puts its
tensors into one row of bytes: one copy brings all of them to the host. Runs in the training thread.
Shapes: b: batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from jest_stream.pipeline.device.backends import Event
from jest_stream.types import Selection
from jest_stream.views import Columns

Marks = list[tuple[str, Event, Event]]
"""Stages, each with its beginning and its end."""


class PendingSelection:
    """The rows of a super-batch that make its sub-batch, as soon as they are known.

    Args:
      selection: on the scoring device; or a function that makes it there when first needed. Its
        tensors may be used within `Slot.handing_out` only.
      read_back: waits for the selection and returns it in host memory. None: it is there already.
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
        """The selection on the scoring device. For use within `Slot.handing_out`."""
        if not isinstance(self._on_device, Selection):
            self._on_device = self._on_device()
        return self._on_device

    def on_host(self) -> Selection:
        """Returns the selection in memory that the host can read. On CUDA this waits for it."""
        if self._known is None:
            self._known = self.on_device if self._read_back is None else self._read_back()
        return self._known

    def is_known(self) -> bool:
        """Returns whether `on_host` would return at once."""
        return self._known is not None or self._has_come is None or self._has_come()

    def part(self, on_device: Tensor, on_host: Tensor) -> PendingSelection:
        """Returns the examples at some places of the draw order.

        Only `indices` and `weights` are cut: the statistics are those of the whole draw.

        Args:
          on_device: the places, on the scoring device.
          on_host: the same, on the CPU.
        """
        return PendingSelection(
            # Later, on the consumer's stream: here nothing has waited for the indices yet.
            lambda: _rows(self.on_device, on_device),
            read_back=lambda: _rows(self.on_host(), on_host),
            has_come=self.is_known,
        )

    def take_rows(self, columns: Columns) -> Columns:
        """Returns the selected rows, on the device where each column lies."""
        taken: Columns = {}
        for name, column in columns.items():
            if isinstance(column, Tensor):
                taken[name] = column.index_select(0, self.on_device.indices.to(column.device))
            else:
                taken[name] = [column[i] for i in self.on_host().indices.tolist()]
        return taken

    # Apart from `take_rows`, which asks `on_device`: that may only be used while handing out.
    def take_rows_on_host(self, columns: Columns) -> Columns:
        """Returns the selected rows of columns whose tensors lie in host memory."""
        indices = self.on_host().indices
        chosen = indices.tolist()
        return {
            name: column[indices] if isinstance(column, Tensor) else [column[i] for i in chosen]
            for name, column in columns.items()
        }

    def weights(self, device: torch.device) -> Tensor:
        """Returns the `[b]` weights on `device`, in memory that nothing here writes to again."""
        weights = self.on_device.weights
        is_asynchronous = device.type != "cpu"  # towards the CPU it would be read too early
        must_copy = self._read_back is not None  # the slot's next selection overwrites these
        return weights.to(device, non_blocking=is_asynchronous, copy=must_copy)

    def device_seconds(self) -> dict[str, float]:
        """Returns the seconds that the device worked on it, by stage. Call it after `on_host`."""
        return {stage: begin.elapsed_time(end) / 1000 for stage, begin, end in self._marks}


def _rows(selection: Selection, rows: Tensor) -> Selection:
    return replace(
        selection,
        indices=selection.indices.index_select(0, rows),
        weights=selection.weights.index_select(0, rows),
    )


class Packing:
    """The place of each tensor of a selection in one row of bytes.

    The widest numbers come first, which aligns all of them: 2 int64, 3 float32 and 1 bool lie at
    bytes 0, 16 and 28 of 29.
    """

    def __init__(self, selection: Selection) -> None:
        tensors = [(each.name, getattr(selection, each.name)) for each in fields(Selection)]
        tensors.sort(key=lambda entry: -entry[1].element_size())
        self._kinds = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors]
        self._sizes = [tensor.nbytes for _, tensor in tensors]
        self.num_bytes = sum(self._sizes)

    def pack(self, selection: Selection, *, out: Tensor) -> None:
        """Writes the selection's bytes to `out`, by one kernel."""
        rows = [getattr(selection, name).reshape(-1) for name, *_ in self._kinds]
        torch.cat([row.view(torch.uint8) for row in rows], out=out)

    def unpack(self, packed: Tensor) -> Selection:
        """Returns the selection whose tensors lie in these bytes, without a copy."""
        parts = zip(self._kinds, torch.split(packed, self._sizes), strict=True)
        return Selection(
            **{name: part.view(dtype).reshape(shape) for (name, dtype, shape), part in parts}
        )
