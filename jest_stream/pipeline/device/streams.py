"""Orders scoring beside training on CUDA: streams, events and the buffers that they guard.

A `Ring` holds slots, each with room for one super-batch that is never given back. Work is queued on
a slot, stream by stream:

    host   gathers columns into the slot's pinned buffers, once their last copy is complete
    copy   waits until the slot is free; pinned buffers to device buffers    -> filled
    score  waits for filled and for the weights; embeds, selects             -> selected, reported
    train  the consumer's current stream: waits for selected; gathers rows   -> the slot is free
    train  between two steps: waits until the weights to be written are read -> ready

The batch is allocated on the consumer's stream, because the allocator must know its user; all that
other streams touch is persistent, or made and used on one stream. Everything is queued by the
training thread. The host waits for the device in one case only: for the selection of the batch at
hand, after all kernels of later super-batches are queued.

Other devices compute when they are called, or have one queue for all: there is nothing to guard,
and a slot holds nothing. Columns are made afresh and moved at once.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from jest_stream.pipeline.device.backends import Backend, Event, Stream
from jest_stream.pipeline.device.pending import Marks, Packing, PendingSelection
from jest_stream.types import Selection
from jest_stream.views import Columns

# A copy engine is first in, first out: one large copy would hold up the training loop's own.
_COPY_BYTES = 32 << 20
_CPU = torch.device("cpu")


class CudaBackend:
    """The protocol on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        # Without a number the device is the current one: that may change, a stream's may not.
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)

    def stream(self) -> Stream:
        """Returns a new stream of the device."""
        stream: Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return stream

    def current_stream(self, device: torch.device | None = None) -> Stream:
        """Returns the caller's stream on `device`, if that is a CUDA device, else on ours."""
        is_cuda = device is not None and device.type == "cuda"
        return torch.cuda.current_stream(device if is_cuda else self._device)

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """Makes the stream and its device the current ones."""
        assert isinstance(stream, torch.cuda.Stream)
        return torch.cuda.stream(stream)

    def mark(self, stream: Stream) -> Event:
        """Returns an event of now that times can be taken between."""
        assert isinstance(stream, torch.cuda.Stream)
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns page-locked memory."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns memory of the device."""
        return torch.empty(shape, dtype=dtype, device=self._device)


def backend_of(device: torch.device) -> Backend | None:
    """Returns the backend of a device that queues its work; None for one that does not."""
    return CudaBackend(device) if device.type == "cuda" else None


def moved(column: Any, device: torch.device) -> Any:
    """Returns a tensor on `device`; anything else as it is."""
    if not isinstance(column, Tensor):
        return column
    # Towards the CPU a copy that does not block would be read before it is there.
    return column.to(device, non_blocking=device.type != "cpu")


class Slot:
    """Room for one super-batch, used again and again. Made by `Ring.slot`."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._backend = ring.backend
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}  # name -> pinned, on the device
        self._filled: Event | None = None
        self._selected: Event | None = None
        self._users: list[Event] = []  # after all that was queued on it since it was filled
        self._marks: Marks = []

    def column(self, name: str, like: Tensor, size: int) -> Tensor:
        """Returns `[size, ...]` host memory to gather a column in, with rows like those of `like`.

        On CUDA it is pinned, and no copy reads from it any more.
        """
        shape = (size, *like.shape[1:])
        if self._backend is None:
            return like.new_empty(shape)
        return self._room(name, shape, like.dtype)[0]

    def fill(self, columns: Columns) -> Columns:
        """Returns the columns with their tensors on the scoring device.

        Args:
          columns: tensors that were gathered in `column`, and lists.
        """
        # There are two cases:
        # 1. A device without a queue has no buffers to guard: tensors are moved at once.
        if self._backend is None:
            return {name: moved(column, self._ring.device) for name, column in columns.items()}
        # 2. On CUDA the copies wait for all former users of the slot: scoring and the gathering of
        #    its last batch may still read the device buffers that are overwritten here.
        copying = self._ring.copying
        for event in self._users:
            copying.wait_event(event)
        filled = dict(columns)
        try:
            with self._backend.use(copying):
                for name, column in columns.items():
                    if isinstance(column, Tensor):  # lists (keys, encoded images) stay on the host
                        filled[name] = self._rooms[name][1][: len(column)]
                        _copy_in_parts(filled[name], column)
        finally:  # if it failed, some copies are queued: the slot's next user waits for them
            self._filled = copying.record_event()
            self._users = [self._filled]
        return filled

    @contextmanager
    def scoring(self, weights: object = None) -> Iterator[None]:
        """Queues the block's work on the scoring stream, after the columns and the weights.

        Args:
          weights: names the weights that are read, see `Ring.writing`.
        """
        ring = self._ring
        # Under the caller's autocast, selection would sum in half precision: it needs float32.
        in_float32 = torch.autocast(ring.device.type, enabled=False)
        if self._backend is None:
            with in_float32:
                yield
            return
        stream = ring.scoring
        if self._filled is not None:  # the columns come by the copying stream
            stream.wait_event(self._filled)
        if ring.ready is not None:  # the weights are written by the training stream
            stream.wait_event(ring.ready)
        self._marks = []
        try:
            with in_float32, self._backend.use(stream):
                yield
        finally:  # if it failed, a part of it is queued and still reads slot and weights
            done = stream.record_event()
            self._users.append(done)
            ring.readers[weights] = done

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Takes the time that the device needs for the block's work within `scoring`."""
        if self._backend is None:
            yield
            return
        begin = self._backend.mark(self._ring.scoring)
        yield
        self._marks.append((stage, begin, self._backend.mark(self._ring.scoring)))

    def keep(self, selection: Selection) -> PendingSelection:
        """Returns a selection made within `scoring`, copied to memory that outlasts its use."""
        if self._backend is None:
            return PendingSelection(selection)
        packing = Packing(selection)
        pinned, packed = self._room("", (packing.num_bytes,), torch.uint8)
        packing.pack(selection, out=packed)
        self._selected = self._ring.scoring.record_event()
        pinned.copy_(packed, non_blocking=True)
        reported: Event = self._ring.scoring.record_event()

        def _read_back() -> Selection:
            # The one wait of the host in a step: the copy to pinned memory is asynchronous.
            reported.synchronize()
            return packing.unpack(pinned.clone())

        return PendingSelection(
            packing.unpack(packed),
            read_back=_read_back,
            has_come=reported.query,
            marks=self._marks,
        )

    def keep_rows(self, name: str, rows: Tensor) -> Tensor:
        """Returns rows computed within `scoring`, copied to memory that outlasts their use.

        To be called before `keep`, whose event the consumer waits for.
        """
        if self._backend is None:
            return rows
        kept = self._room(name, tuple(rows.shape), rows.dtype)[1]
        kept.copy_(rows)
        return kept

    def restore(self, selection: Selection) -> PendingSelection:
        """Returns a selection of a former run, with its tensors on the CPU, as `keep` does."""
        if self._backend is None:
            tensors = {field.name: getattr(selection, field.name) for field in fields(Selection)}
            there = {name: moved(tensor, self._ring.device) for name, tensor in tensors.items()}
            return PendingSelection(Selection(**there))
        packing = Packing(selection)
        pinned, packed = self._room("", (packing.num_bytes,), torch.uint8)
        self.settle()  # an abandoned selection may still be on its way to the pinned memory
        packing.pack(selection, out=pinned)
        with self.scoring():
            packed.copy_(pinned, non_blocking=True)
            self._selected = self._ring.scoring.record_event()
        return PendingSelection(packing.unpack(packed), read_back=lambda: selection)

    @contextmanager
    def handing_out(self) -> Iterator[None]:
        """Has the consumer's current stream wait for the selection, and the slot for the block.

        Memory that the block allocates belongs to the consumer.
        """
        if self._backend is None:
            yield
            return
        consumer = self._backend.current_stream()
        if self._selected is not None:  # indices and weights are made on the scoring stream
            consumer.wait_event(self._selected)
        try:
            yield
        finally:
            self._users.append(consumer.record_event())

    def reopen(self) -> None:
        """Waits until the host may write to the pinned buffers; usually it may."""
        # The copies of the slot's last filling read them. They were queued at least a whole step
        # ago, except where super-batches were dropped.
        if self._filled is not None and not self._filled.query():
            self._filled.synchronize()

    def settle(self) -> None:
        """Waits until the device does not use the slot."""
        for event in self._users:
            event.synchronize()

    def release(self) -> None:
        """Lets go of the memory, which nothing may use any more."""
        self._rooms.clear()

    def _room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns pinned and device memory of that shape: the same as before where it fits."""
        size = shape[0]
        if name in self._rooms:
            pinned, on_device = self._rooms[name]
            if pinned.dtype == dtype and pinned.shape[1:] == shape[1:] and len(pinned) >= size:
                return pinned[:size], on_device[:size]
        assert self._backend is not None
        # The memory replaced may still be in use, which is safe in both its parts. The device part
        # is the copying stream's, which waits for all users before it writes; the pinned part is
        # watched by its allocator until the copies from it are done.
        with self._backend.use(self._ring.copying):
            rooms = self._backend.pinned(shape, dtype), self._backend.buffer(shape, dtype)
        self._rooms[name] = rooms
        return rooms


class Ring:
    """The streams that score beside training, and the slots of the super-batches in flight.

    Args:
      device: where scoring runs. Until `place` says so, the CPU: models may still be moved.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self._is_finalizing = sys.is_finalizing  # modules may be gone by then
        self._begin(device)

    def _begin(self, device: torch.device) -> None:
        self.device = device
        self.backend = backend_of(device)
        if self.backend is not None:
            self.copying, self.scoring = self.backend.stream(), self.backend.stream()
        self.ready: Event | None = None
        """After the last write to a model that scores."""
        self.readers: dict[object, Event] = {}
        """By the weights that are read: the event after their last reader."""
        self._slots: list[Slot] = []

    def place(self, device: torch.device) -> None:
        """Scores on this device from now on; super-batches in flight stay where they are."""
        if device != self.device:
            self.drain()
            self._begin(device)

    def slot(self, in_use: Collection[Slot] = ()) -> Slot:
        """Returns a slot that is not in use; a new one if all are.

        The device may still be at work on the slot's former super-batch: `fill` waits for that.
        """
        for slot in self._slots:
            if not any(slot is other for other in in_use):
                break
        else:
            slot = Slot(self)
            self._slots.append(slot)
        slot.reopen()
        return slot

    @contextmanager
    def writing(self, weights: object, home: torch.device | None = None) -> Iterator[None]:
        """Lets the block write to a model that scores, on the caller's current stream.

        Args:
          weights: names the weights written, as in `Slot.scoring`: their readers are waited for.
          home: the device that the values come from: copies run on its current stream.
        """
        if self.backend is None:
            yield
            return
        writer = self.backend.current_stream(home)
        if weights in self.readers:  # scoring may still read them
            writer.wait_event(self.readers.pop(weights))
        if self.ready is not None:  # of another stream, if the caller's has changed
            writer.wait_event(self.ready)
        try:
            yield
        finally:
            self.ready = writer.record_event()

    def drain(self) -> None:
        """Waits until the device has done all that was queued: models may be let go of then."""
        if self.backend is None or self._is_finalizing():  # the driver may be gone
            return
        for slot in self._slots:
            slot.settle()
        if self.ready is not None:
            self.ready.synchronize()

    def close(self) -> None:
        """Waits as `drain` does, then lets go of the slots' memory."""
        self.drain()
        for slot in self._slots:
            slot.release()
        self._slots.clear()


def _copy_in_parts(target: Tensor, source: Tensor) -> None:
    num_rows = max(1, _COPY_BYTES * len(source) // max(1, source.nbytes))
    for start in range(0, len(source), num_rows):
        rows = slice(start, start + num_rows)
        target[rows].copy_(source[rows], non_blocking=True)
