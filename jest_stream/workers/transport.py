"""Packs messages between the training process and its workers: values, and errors with tracebacks.

In: anything that pickles, such as a block of columns. Out, in the other process: the same, with
tensors and arrays that own their memory. Pickle protocol 5 takes their bytes out of the pickled
object, so that they are copied once. A short message goes through the socket; of a long one only a
descriptor does, of memory without a name, so that a worker that stops halfway leaves nothing to
wait for. Only our own processes' messages are unpickled, never data that was read.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import socket
import struct
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Through the socket 64 KiB take as long as through memory of their own, 1 MiB takes three times as
# long (a process on each of 2 cores).
_MAX_INLINE_BYTES = 1 << 16
_ALIGNMENT = 64
_HEADER = struct.Struct("!QQ?")  # number of parts, bytes in all, whether they are in memory


@dataclass(frozen=True)
class Failure:
    """An error that a worker sends in place of the value it was asked for."""

    error: Exception
    traceback: str
    position: int = 0
    """Position of the failed item among those that the worker was asked for."""


class WorkerTraceback(Exception):
    """Shows, as the cause of an error, where in a worker process it was raised."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class Message:
    """A value on its way out. Owns the memory that it lies in, until it is sent.

    The parts are the pickled object and the bytes of each tensor and array in it. Before them
    stands a table of their sizes; each begins at a multiple of 64 bytes: with parts of 100 and 10
    bytes the table fills bytes 0 to 15, the parts 64 to 163 and 192 to 201.

    Args:
      value: a picklable object.
      is_inline: whether a short message may go through the socket. If not, sending never waits for
        the other side to read.
    """

    def __init__(self, value: object, *, is_inline: bool = True) -> None:
        buffers: list[pickle.PickleBuffer] = []
        parts: list[Any] = [_pickled(value, buffers.append), *(each.raw() for each in buffers)]
        sizes = [part.nbytes for part in parts]
        pieces: list[Any] = []
        for piece in [struct.pack(f"!{len(sizes)}Q", *sizes), *parts]:
            pieces += [piece, bytes(-memoryview(piece).nbytes % _ALIGNMENT)]
        self._num_parts = len(parts)
        self.num_bytes = sum(memoryview(piece).nbytes for piece in pieces)
        """Bytes of all pieces together."""
        self._pieces = pieces
        self._memory: io.FileIO | None = None
        if self.num_bytes > _MAX_INLINE_BYTES or not is_inline:
            self._pieces = []
            self._memory = new_memory()
            try:
                for piece in pieces:
                    _write(self._memory.fileno(), piece)
            except BaseException:
                self._memory.close()
                raise

    def send(self, connection: socket.socket) -> None:
        """Sends it, and lets go of it. Waits while the other side does not read."""
        header = _HEADER.pack(self._num_parts, self.num_bytes, self._memory is not None)
        if self._memory is None:
            connection.sendall(b"".join([header, *self._pieces]))
            return
        try:
            while True:
                try:
                    socket.send_fds(connection, [header], [self._memory.fileno()])
                    return
                except OSError as error:
                    # The system limits the descriptors that are in sockets and not yet received.
                    if error.errno != errno.ETOOMANYREFS:
                        raise
                    time.sleep(0.01)  # until the other side has taken some of those on their way
        finally:
            self._memory.close()


def failure_message(error: Exception, *, position: int = 0) -> Message:
    """Returns an error as a message; as a `RuntimeError` where it cannot travel itself."""
    text = "".join(traceback.format_exception(error))
    # An error of a library may hold a lock or a socket, or take other arguments than it keeps. It
    # travels itself only if the same error comes out; the user may want to catch its type.
    try:
        arrived = pickle.loads(_pickled(error))  # some can be pickled, but not unpickled
        if type(arrived) is type(error) and str(arrived) == str(error):
            return Message(Failure(error, text, position))
    except Exception:
        pass
    stand_in = RuntimeError(f"{type(error).__name__}: {error}")
    return Message(Failure(stand_in, text, position))


def receive(connection: socket.socket, sentinel: int | None, timeout_s: float) -> Any:
    """Returns the value of the next message; its tensors own their memory.

    Args:
      connection: to the sender.
      sentinel: of the process that sends it: ready when that is gone. None: not watched.
      timeout_s: longest wait for all of it.

    Raises:
      TimeoutError: if it did not come.
      EOFError: if the process is gone, or has closed its side.
    """
    deadline = time.monotonic() + timeout_s
    header, memory = b"", None
    try:
        # The descriptor comes with the header's first byte, even where the header comes in pieces.
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
        num_parts, num_bytes, is_in_memory = _HEADER.unpack(header)
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
    pickled, *buffers = _parts_of(view, num_parts)
    return pickle.loads(pickled, buffers=buffers)


def new_memory() -> io.FileIO:
    """Returns memory that can be shared, as a file; it ends with its last descriptor."""
    if hasattr(os, "memfd_create"):
        return io.FileIO(os.memfd_create("jest_stream"), "r+")  # no container limits it
    descriptor, path = tempfile.mkstemp(prefix="jest_stream")
    os.unlink(path)
    return io.FileIO(descriptor, "r+")


def _parts_of(view: memoryview, num_parts: int) -> list[memoryview]:
    """Returns the parts of a message, by the table of sizes at its head."""
    sizes = struct.unpack_from(f"!{num_parts}Q", view)
    parts, offset = [], _aligned(8 * num_parts)
    for size in sizes:
        parts.append(view[offset : offset + size])
        offset += _aligned(size)
    return parts


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


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
    # A worker that has sent its last message and ended makes both ready: the message comes first.
    if not ready:
        raise TimeoutError
    if connection not in ready:
        raise EOFError


def _write(memory: int, data: Any) -> None:
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(memory, view) :]


def _pickled(
    value: object, take_buffer: Callable[[pickle.PickleBuffer], object] | None = None
) -> memoryview:
    """Returns the pickled object; the bytes of tensors and arrays go to `take_buffer`, if given."""
    file = io.BytesIO()
    _Pickler(file, 5, buffer_callback=take_buffer).dump(value)
    return file.getbuffer()


class _Pickler(pickle.Pickler):
    """Takes the bytes of tensors out of the pickled object, as numpy does with its arrays.

    `torch.multiprocessing` would give each a file in /dev/shm and a descriptor, open as long as the
    tensor lives; torch's own `__reduce_ex__` calls `torch.save` and `torch.load`.
    """

    def reducer_override(self, value: Any) -> Any:
        """Returns how a tensor is made again; all else is pickled as usual.

        There are three cases:
        1. A tensor on another device, and a quantized one, travel as torch pickles them.
        2. A sparse tensor is made of its dense parts, which come here again: made dense, one of
           256 x 1,000,000 would take 1 GB. torch's own way would keep each one that it unpickles
           in a list, until the next `torch.load` (torch 2.14).
        3. Any other arrives as a plain tensor over the bytes received, without gradient.
        """
        if not isinstance(value, Tensor) or value.is_quantized or value.device.type != "cpu":
            return NotImplemented
        layout = value.layout
        parts: tuple[Tensor, ...]
        if layout == torch.strided:
            plain = value.detach().resolve_conj().resolve_neg().contiguous()
            data: Any = plain.flatten().view(torch.uint8).numpy() if plain.numel() else b""
            return _tensor_of, (pickle.PickleBuffer(data), tuple(plain.shape), plain.dtype)
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


def _tensor_of(data: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if not memoryview(data).nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)
