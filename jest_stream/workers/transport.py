"""Messages between processes: values, or errors with the traceback that they had in the worker.

A message is a pickle (protocol 5) followed by the bytes of its tensors and arrays. Up to 64 KiB go
through the socket. Of a longer message only a descriptor does, of memory without a name: a worker
that stops halfway leaves nothing in /dev/shm and no lock that others wait for. The thread that
calls does the work.

Only messages of our own processes are unpickled, over a socket that no other process can open.
Data that was read from a source stays bytes here.
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
from itertools import accumulate
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Through the socket 64 KiB take as long as through memory of their own, 1 MiB takes three times as
# long (a process on each of 2 cores).
_MAX_INLINE_BYTES = 1 << 16
_ALIGNMENT = 64
_HEADER = struct.Struct("!QQ?")  # number of parts, bytes of all, whether they lie in memory


@dataclass(frozen=True)
class Failure:
    """An error that a worker sends instead of the value asked for."""

    error: Exception
    traceback: str
    position: int = 0
    """Of the item that it failed at, among those asked for."""


class WorkerTraceback(Exception):
    """Shows, as the cause of an error, where in a worker process it was raised."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class Message:
    """A serialised value on its way out. Owns the memory that it lies in, until it is sent.

    Args:
      value: the value; its CPU tensors and numpy arrays travel as their bytes, wherever they are.
      is_inline: whether a short message may go through the socket. If not, sending never waits for
        the other side to read.
    """

    def __init__(self, value: Any, *, is_inline: bool = True) -> None:
        buffers: list[pickle.PickleBuffer] = []
        pickled = _pickled(value, buffers.append)
        contents = [memoryview(pickled), *(buffer.raw() for buffer in buffers)]
        sizes = [content.nbytes for content in contents]
        # A table of sizes, the pickle, the buffers; each begins at a multiple of 64 bytes. With
        # sizes (100, 40): table at 0, pickle at 64, buffer at 192, 256 bytes in all.
        table = struct.pack(f"!{len(sizes)}Q", *sizes)
        self._num_contents = len(sizes)
        self._parts: list[bytes | memoryview] = [table, bytes(-len(table) % _ALIGNMENT)]
        for content in contents:
            self._parts += [content, bytes(-content.nbytes % _ALIGNMENT)]
        self.num_bytes = sum(map(len, self._parts))
        """Memory that it takes."""
        self._memory: io.FileIO | None = None
        if self.num_bytes > _MAX_INLINE_BYTES or not is_inline:
            self._memory = new_memory()
            writer = io.BufferedWriter(self._memory)
            for part in self._parts:
                writer.write(part)
            writer.detach()
            self._parts = []

    def send(self, connection: socket.socket) -> None:
        """Sends it, and lets go of it. Waits while the other side does not read."""
        header = _HEADER.pack(self._num_contents, self.num_bytes, self._memory is not None)
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


def failure_message(error: Exception, *, position: int = 0) -> Message:
    """Returns an error as a message; as a `RuntimeError` where it cannot travel itself."""
    text = "".join(traceback.format_exception(error))
    try:
        arrived = pickle.loads(_pickled(error))  # some can be pickled but not unpickled
        if type(arrived) is type(error) and str(arrived) == str(error):
            return Message(Failure(error, text, position))
    except Exception:
        pass
    return Message(Failure(RuntimeError(f"{type(error).__name__}: {error}"), text, position))


def receive(connection: socket.socket, sentinel: int | None, timeout_s: float) -> Any:
    """Returns the next message; its tensors and arrays own their memory.

    Args:
      connection: the socket that it comes from.
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
        num_contents, num_bytes, is_in_memory = _HEADER.unpack(header)
        unfilled: Any = np.empty(num_bytes, np.uint8)  # not zeroed, as a bytearray would be
        content = memoryview(unfilled)
        if is_in_memory:
            assert memory is not None
            for start in range(0, num_bytes, 1 << 30):  # a read takes less than 2 GiB
                os.preadv(memory, [content[start : start + (1 << 30)]], start)
        else:
            _receive_into(content, connection, sentinel, deadline)
    finally:
        if memory is not None:
            os.close(memory)
    sizes = struct.unpack_from(f"!{num_contents}Q", content)
    starts = accumulate(map(_aligned, sizes), initial=_aligned(8 * num_contents))
    contents = [content[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    return pickle.loads(contents[0], buffers=contents[1:])


def new_memory() -> io.FileIO:
    """Returns memory that can be shared, as a file; it ends with its last descriptor."""
    if hasattr(os, "memfd_create"):
        return io.FileIO(os.memfd_create("jest_stream"), "r+")  # no container limits it
    descriptor, path = tempfile.mkstemp(prefix="jest_stream")
    os.unlink(path)
    return io.FileIO(descriptor, "r+")


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
    if not ready:
        raise TimeoutError
    # A process that has sent and then ended makes both ready: its message is still read.
    if connection not in ready:
        raise EOFError


def _pickled(
    value: Any, take_buffer: Callable[[pickle.PickleBuffer], object] | None = None
) -> memoryview:
    """Returns the pickle of a value; bytes of tensors and arrays go to `take_buffer`, if given."""
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=take_buffer).dump(value)
    return file.getbuffer()


class _Pickler(pickle.Pickler):
    """Pickles tensors as their bytes.

    `torch.multiprocessing` would give each a file in /dev/shm, and a descriptor that stays open
    while the tensor lives; torch's own `__reduce_ex__` calls `torch.save` and `torch.load`.
    """

    def reducer_override(self, value: Any) -> Any:
        """Returns how a tensor is rebuilt. There are three cases:

        1. A dense tensor on the CPU is rebuilt over its bytes, as a plain tensor without gradient.
        2. A sparse one is rebuilt of its dense parts, which come here again. Torch's own way keeps
           each that arrives in a list, until the next `torch.load` checks them (torch 2.14).
        3. Any other, and every other object, travels as its class says.
        """
        if not isinstance(value, Tensor):
            return NotImplemented
        layout = value.layout
        if layout == torch.strided:
            if value.is_quantized or value.device.type != "cpu":
                return NotImplemented
            plain = value.detach().resolve_conj().resolve_neg().contiguous()
            data: Any = plain.flatten().view(torch.uint8).numpy()
            return _tensor, (pickle.PickleBuffer(data), plain.dtype, tuple(plain.shape))
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


def _tensor(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Returns the tensor that lies in these bytes, without a copy."""
    if len(data) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)
