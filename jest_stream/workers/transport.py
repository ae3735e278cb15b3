"""What goes between processes: what has `items`, and errors with the traceback that they had there.

A message is the serialised value followed by the bytes of its tensors. A short one goes through
the socket; of a long one only a descriptor does, of memory that nobody else can name, so that a
worker that stops halfway leaves nothing to wait for. Objects are serialised for our own processes
only; nothing that was read is ever interpreted as such.
"""

from __future__ import annotations

import copyreg
import errno
import io
import os
import socket
import struct
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Through the socket 64 KiB take as long as through memory of their own, 1 MiB takes three times as
# long (a process on each of 2 cores).
_MAX_INLINE_BYTES = 1 << 16
_ALIGNMENT = 64
_HEADER = struct.Struct("!QQ?")  # bytes of the object, bytes in all, whether they are in memory


@dataclass(frozen=True)
class Failure:
    """What a worker sends in place of what it was asked for."""

    error: Exception
    traceback: str
    place: int = 0
    """Which item of those that it was asked for it failed at."""


class WorkerTraceback(Exception):
    """Shows, as the cause of an error, where in a worker process it was raised."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class Message:
    """A value or failure on its way out. Owns the memory that it lies in, until it is sent."""

    def __init__(
        self, value: Any, tensors: list[np.ndarray[Any, Any]], *, is_inline: bool = True
    ) -> None:
        pickled = io.BytesIO()
        _Pickler(pickled).dump(value)
        parts: list[Any] = [pickled.getbuffer()]
        for tensor in tensors:
            parts += [bytes(-parts[-1].nbytes % _ALIGNMENT), tensor]
        self._num_object_bytes = pickled.tell()
        self.num_bytes = sum(memoryview(part).nbytes for part in parts)
        """How much memory it takes."""
        self._parts = parts
        self._memory: io.FileIO | None = None
        if self.num_bytes > _MAX_INLINE_BYTES or not is_inline:
            self._parts = []
            self._memory = new_memory()
            try:
                for part in parts:
                    _write(self._memory.fileno(), part)
            except BaseException:
                self._memory.close()
                raise

    def send(self, connection: socket.socket) -> None:
        """Sends it, and lets go of it. Waits while the other side does not read."""
        header = _HEADER.pack(self._num_object_bytes, self.num_bytes, self._memory is not None)
        if self._memory is None:
            connection.sendall(b"".join([header, *self._parts]))
            return
        try:
            while True:
                try:
                    socket.send_fds(connection, [header], [self._memory.fileno()])
                    return
                except OSError as error:
                    if error.errno != errno.ETOOMANYREFS:
                        raise
                    time.sleep(0.01)  # until the other side has taken some of those on their way
        finally:
            self._memory.close()


def dump(value: Any, *, is_inline: bool = True) -> Message:
    """Returns a dataclass as a message; the tensors among its `items` travel as their bytes.

    Args:
      value: what is sent, such as a block.
      is_inline: whether it may go through the socket if it is short. If not, sending never waits
        for the other side to read.
    """
    tensors: list[np.ndarray[Any, Any]] = []
    offset = 0

    def place(tensor: Tensor) -> Any:
        """Returns what stands for a tensor: where its bytes lie."""
        nonlocal offset
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            return tensor  # travels as its own way of being copied says
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        start = offset
        if plain.numel() > 0:
            tensors.append(plain.flatten().view(torch.uint8).numpy())
            offset += -(-tensors[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
        return _Placed(start, tuple(plain.shape), plain.dtype)

    placed = replace(value, items=_map_tensors(value.items, place))
    return Message(placed, tensors, is_inline=is_inline)


def dump_failure(error: Exception, *, place: int = 0) -> Message:
    """Returns an error as a message; as a `RuntimeError` where it cannot travel itself."""
    text = "".join(traceback.format_exception(error))
    try:
        sent = io.BytesIO()
        _Pickler(sent).dump(error)
        arrived = ForkingPickler.loads(sent.getbuffer())  # some can be sent but not received
        if type(arrived) is type(error) and str(arrived) == str(error):
            return Message(Failure(error, text, place), [])
    except Exception:
        pass
    stand_in = RuntimeError(f"{type(error).__name__}: {error}")
    return Message(Failure(stand_in, text, place), [])


def receive(connection: socket.socket, sentinel: int | None, timeout_s: float) -> Any:
    """Returns the next message; its tensors own their memory.

    Args:
      connection: where it comes from.
      sentinel: of the process that sends it: ready when that is gone. None: not watched.
      timeout_s: longest wait for all of it.

    Raises:
      TimeoutError: if it did not come.
      EOFError: if the process is gone, or has closed its side.
    """
    deadline = time.monotonic() + timeout_s
    header, memory = b"", None
    try:
        while len(header) < _HEADER.size:
            _wait(connection, sentinel, deadline)
            data, memories, flags, _ = socket.recv_fds(connection, _HEADER.size - len(header), 1)
            memory = memories[0] if memories else memory
            if flags & socket.MSG_CTRUNC:
                raise OSError(
                    errno.EMFILE, "too many open files to receive a block: raise ulimit -n"
                )
            if not data:
                raise EOFError
            header += data
        num_object_bytes, num_bytes, is_in_memory = _HEADER.unpack(header)
        content: Any = np.empty(num_bytes, np.uint8)
        view = memoryview(content)
        if is_in_memory:
            assert memory is not None
            for start in range(0, num_bytes, 1 << 30):  # a read takes less than 2 GiB
                os.preadv(memory, [view[start : start + (1 << 30)]], start)
        else:
            _receive_into(view, connection, sentinel, deadline)
    finally:
        if memory is not None:
            os.close(memory)
    loaded = ForkingPickler.loads(view[:num_object_bytes])
    if isinstance(loaded, Failure):
        return loaded
    tensors = content[-(-num_object_bytes // _ALIGNMENT) * _ALIGNMENT :]

    def restore(value: Any) -> Tensor:
        """Returns the tensor that a place stands for."""
        return value.of(tensors) if isinstance(value, _Placed) else value

    return replace(loaded, items=_map_tensors(loaded.items, restore))


def new_memory() -> io.FileIO:
    """Returns memory that can be shared, as a file; it ends with its last descriptor."""
    if hasattr(os, "memfd_create"):
        return io.FileIO(os.memfd_create("jest_stream"), "r+")  # no container limits it
    descriptor, path = tempfile.mkstemp(prefix="jest_stream")
    os.unlink(path)
    return io.FileIO(descriptor, "r+")


def _receive_into(
    view: memoryview, connection: socket.socket, sentinel: int | None, deadline: float
) -> None:
    position = 0
    while position < len(view):
        try:
            num_bytes = connection.recv_into(view[position:])
        except BlockingIOError:
            _wait(connection, sentinel, deadline)
            continue
        if num_bytes == 0:
            raise EOFError
        position += num_bytes


def _wait(connection: socket.socket, sentinel: int | None, deadline: float) -> None:
    """Returns when there is something to read; raises if there never will be."""
    watched: list[Any] = [connection] if sentinel is None else [connection, sentinel]
    ready = wait(watched, max(deadline - time.monotonic(), 0))
    if not ready:
        raise TimeoutError
    if connection not in ready:
        raise EOFError


def _write(memory: int, data: Any) -> None:
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(memory, view) :]


class _Pickler(ForkingPickler):
    """Tensors within objects of other people travel as bytes, not in named shared memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, 5)  # 5: arrays are copied once less
        self.dispatch_table = copyreg.dispatch_table

    def reducer_override(self, value: Any) -> Any:
        """Returns how a sparse tensor is copied: torch's own way keeps each that arrives.

        It puts them into a list that the next `torch.load` checks and empties (torch 2.14).
        """
        layout = value.layout if isinstance(value, Tensor) else None
        parts: tuple[Tensor, ...]
        if layout == torch.sparse_coo:
            make = partial(torch.sparse_coo_tensor, is_coalesced=value.is_coalesced())
            parts = value._indices(), value._values()
        elif layout in (torch.sparse_csr, torch.sparse_bsr):
            make = partial(torch.sparse_compressed_tensor, layout=layout)
            parts = value.crow_indices(), value.col_indices(), value.values()
        elif layout in (torch.sparse_csc, torch.sparse_bsc):
            make = partial(torch.sparse_compressed_tensor, layout=layout)
            parts = value.ccol_indices(), value.row_indices(), value.values()
        else:
            return NotImplemented
        # A tensor made them, so they need no check.
        return partial(make, check_invariants=False), (*parts, value.shape)


@dataclass(frozen=True)
class _Placed:
    """A tensor on its way between processes: where its bytes are, behind the object."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, memory: np.ndarray[Any, Any]) -> Tensor:
        """Returns the tensor."""
        count = int(np.prod(self.shape))
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset).reshape(
            self.shape
        )


def _map_tensors(value: Any, function: Callable[[Any], Any]) -> Any:
    """Returns the value with `function` applied to the tensors in its dicts, lists and tuples."""
    if isinstance(value, (Tensor, _Placed)):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(entry, function) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_map_tensors(entry, function) for entry in value])
    return value
