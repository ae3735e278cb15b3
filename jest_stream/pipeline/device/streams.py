"""Scoring beside training on CUDA: streams, events and the buffers that they guard. All of it.

A `Ring` holds slots, each with room for one super-batch that is never given back. What is queued on
a slot, and on which stream:

    host   gathers columns into the slot's pinned buffers, once their last copy is complete
    copy   waits until the slot is free; pinned buffers to device buffers    -> filled
    score  waits for filled and for the weights; embeds, chooses             -> selected, reported
    train  the consumer's current stream: waits for selected; gathers rows   -> the slot is free
    train  between two steps: waits until the weights to be written are read -> ready

The batch is allocated on the consumer's stream, so that the allocator knows who uses it; all that
other streams touch is persistent, or made and used on one stream. Everything is queued by the
training thread. The host never waits for the device, but for one thing: the choice behind the batch
at hand, when all kernels of later super-batches are queued.

On other devices the same calls are made in the same order, and a slot holds nothing: columns are
made afresh and moved at once.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from jest_stream.pipeline.device.backends import Backend, DirectBackend, Event, Stream
from jest_stream.pipeline.device.choice import Choice, Marks, Packing
from jest_stream.types import Selection

# Copy engines are first in, first out: a large copy would hold up the training loop's own.
_COPY_BYTES = 32 << 20


class CudaBackend:
    """The protocol on a CUDA device."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        # Without a number it is whichever is current: that may change, a stream's device not.
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
        """Makes the stream, and its device, the current one."""
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


def backend_of(device: torch.device) -> Backend:
    """Returns how to work on a device."""
    return CudaBackend(device) if device.type == "cuda" else DirectBackend()


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
        self._users: list[Event] = []  # behind all that was queued on it since it was filled
        self._marks: Marks = []

    def column(self, name: str, like: Tensor, size: int) -> Tensor:
        """Returns `[size, ...]` memory of the host to gather a column in, rows being as `like`'s.

        On CUDA it is pinned, and nothing copies from it any more.
        """
        shape = (size, *like.shape[1:])
        if not self._backend.overlaps:
            return like.new_empty(shape)
        return self._room(name, shape, like.dtype)[0]

    def fill(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns with their tensors on the scoring device.

        Args:
          columns: tensors that were gathered in `column`, and lists.
        """
        if not self._backend.overlaps:
            return {name: moved(column, self._ring.device) for name, column in columns.items()}
        copying = self._ring.copying
        for event in self._users:
            copying.wait_event(event)
        filled = dict(columns)
        try:
            with self._backend.use(copying):
                for name, column in columns.items():
                    if isinstance(column, Tensor):
                        filled[name] = self._rooms[name][1][: len(column)]
                        _copy_in_parts(filled[name], column)
        finally:
            self._filled = copying.record_event()
            self._users = [self._filled]
        return filled

    @contextmanager
    def scoring(self, weights: object = None) -> Iterator[None]:
        """Queues what the block does on the scoring stream, behind the columns and the weights.

        Args:
          weights: names the weights that are read, see `Ring.writing`.
        """
        ring, stream = self._ring, self._ring.scoring
        if self._filled is not None:
            stream.wait_event(self._filled)
        if ring.ready is not None:
            stream.wait_event(ring.ready)
        self._marks = []
        try:
            # Whatever the caller's autocast is: selection sums in float32.
            with torch.autocast(ring.device.type, enabled=False), self._backend.use(stream):
                yield
        finally:  # if it failed, a part of it is queued
            done = stream.record_event()
            self._users.append(done)
            ring.readers[weights] = done

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Takes the time that the device needs for what the block queues within `scoring`."""
        if not self._backend.overlaps:
            yield
            return
        begin = self._backend.mark(self._ring.scoring)
        yield
        self._marks.append((stage, begin, self._backend.mark(self._ring.scoring)))

    def keep(self, selection: Selection) -> Choice:
        """Returns what was chosen within `scoring`, copied to where it outlasts its use."""
        if not self._backend.overlaps:
            return Choice(selection)
        packing = Packing.of(selection)
        pinned, packed = self._room("", (packing.num_bytes,), torch.uint8)
        packing.pack(selection, out=packed)
        self._selected = self._ring.scoring.record_event()
        pinned.copy_(packed, non_blocking=True)
        reported: Event = self._ring.scoring.record_event()

        def _read_back() -> Selection:
            reported.synchronize()
            return packing.unpack(pinned.clone())

        return Choice(
            packing.unpack(packed),
            read_back=_read_back,
            has_come=reported.query,
            marks=self._marks,
        )

    def keep_rows(self, name: str, rows: Tensor) -> Tensor:
        """Returns what was computed within `scoring`, copied to where it outlasts its use.

        To be called before `keep`, behind which the consumer waits.
        """
        if not self._backend.overlaps:
            return rows
        kept = self._room(name, tuple(rows.shape), rows.dtype)[1]
        kept.copy_(rows)
        return kept

    def restore(self, selection: Selection) -> Choice:
        """Returns a choice of a former run, whose tensors lie on the CPU, as `keep` does."""
        if not self._backend.overlaps:
            tensors = {field.name: getattr(selection, field.name) for field in fields(Selection)}
            return Choice(Selection(**{k: moved(v, self._ring.device) for k, v in tensors.items()}))
        packing = Packing.of(selection)
        pinned, packed = self._room("", (packing.num_bytes,), torch.uint8)
        self.settle()  # a choice that was abandoned may still be on its way there
        packing.pack(selection, out=pinned)
        with self.scoring():
            packed.copy_(pinned, non_blocking=True)
            self._selected = self._ring.scoring.record_event()
        return Choice(packing.unpack(packed), read_back=lambda: selection)

    @contextmanager
    def handing_out(self) -> Iterator[None]:
        """Has the consumer's current stream wait for the choice, and the slot for the block.

        What the block allocates belongs to the consumer.
        """
        consumer = self._backend.current_stream()
        if self._selected is not None:
            consumer.wait_event(self._selected)
        try:
            yield
        finally:
            self._users.append(consumer.record_event())

    def reopen(self) -> None:
        """Waits until the host may write to the pinned buffers; usually it may."""
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
        # What is replaced may still be in use: by those for whom the copying stream, whose memory
        # it is, will wait, and by copies from the pinned part, which its allocator watches.
        with self._backend.use(self._ring.copying):
            rooms = self._backend.pinned(shape, dtype), self._backend.buffer(shape, dtype)
        self._rooms[name] = rooms
        return rooms


class Ring:
    """The streams that score beside training, and the slots of the super-batches in flight.

    Args:
      device: where scoring runs.
      backend: how to work on it. None: as the device needs.
    """

    def __init__(self, device: torch.device, backend: Backend | None = None) -> None:
        self.device = device
        self.backend = backend_of(device) if backend is None else backend
        self.copying, self.scoring = self.backend.stream(), self.backend.stream()
        self.ready: Event | None = None
        """Behind the last write to a model that scores."""
        self.readers: dict[object, Event] = {}
        """By the weights that are read: the event behind their last reader."""
        self._slots: list[Slot] = []
        self._is_finalizing = sys.is_finalizing  # modules may be gone by then

    def slot(self, in_use: Collection[Slot] = ()) -> Slot:
        """Returns a slot that is not in use; a new one if all are.

        The device may still be at work on what was there before: it is waited for there.
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
          weights: names what is written, as in `Slot.scoring`: its readers are waited for.
          home: the device that the values come from: copies run on its current stream.
        """
        writer = self.backend.current_stream(home)
        if weights in self.readers:
            writer.wait_event(self.readers.pop(weights))
        if self.ready is not None:  # of another stream, if the caller's has changed
            writer.wait_event(self.ready)
        try:
            yield
        finally:
            self.ready = writer.record_event()

    def drain(self) -> None:
        """Waits until the device does nothing for us: then models may be let go of."""
        if not self.backend.overlaps or self._is_finalizing():  # the driver may be gone
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
