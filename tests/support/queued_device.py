"""`QueuedDevice` models a device with streams, on the CPU, and looks for missing waits.

    device = QueuedDevice()
    with device.watched():
        ...            # ops on tensors of the device are queued on the current stream

It runs real torch code on real tensors; each op is computed at once, noted down with the memory
that it reads and writes, and put after the work that is ordered before it: its stream's, the events
that the stream waited for, and the host's own work and waits. `races` lists accesses to one memory
that nothing orders, the reuse of freed memory included: allocators hand a block out again on the
stream that it was allocated on. `replay` runs all of it again in another order that the waits
allow, as a device might.

The device has no values for the host: `host_reads` lists every place where one was asked for.
Memory is tracked by storage. Not modelled: copies between devices, and the order that a CUDA
device's legacy default stream adds.
"""

from __future__ import annotations

import linecache
import random
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

HOST = "host"
_READERS = {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__}

Clock = dict[str, int]


@dataclass(eq=False)
class Node:
    """Something that happened on a stream or on the host, and what must come before it."""

    stream: str
    before: list[Node]
    call: Any = None  # (function, args, kwargs, outputs)


@dataclass(eq=False)
class Memory:
    """A block of memory and who used it last, by stream and tick."""

    name: str
    owner: str | None  # the stream that it was allocated on; None for pinned memory
    alive: Any
    writes: Clock = field(default_factory=dict)
    reads: Clock = field(default_factory=dict)


class QueuedEvent:
    """A place in a stream's work."""

    def __init__(self, device: QueuedDevice, clock: Clock, node: Node) -> None:
        self._device, self.clock, self.node = device, clock, node

    def query(self) -> bool:
        """Returns whether the host knows: the model's device is as late as it may be."""
        known = self._device.clocks[HOST]
        return all(known.get(name, 0) >= tick for name, tick in self.clock.items())

    def synchronize(self) -> None:
        if not self._device.skips():
            self._device.order(HOST, after=self)

    def elapsed_time(self, end_event: QueuedEvent) -> float:
        if not (self.query() and end_event.query()):
            self._device.races.append("host reads times before they are known")
        return 1.0


class QueuedStream:
    """Work in order."""

    def __init__(self, device: QueuedDevice, name: str) -> None:
        self._device, self.name = device, name
        device.clocks[name] = {}

    def wait_event(self, event: QueuedEvent) -> None:
        if not self._device.skips():
            self._device.order(self.name, after=event)

    def record_event(self) -> QueuedEvent:
        device = self._device
        node = device.tick(self.name)
        return QueuedEvent(device, dict(device.clocks[self.name]), node)


class QueuedDevice:
    """The backend: streams, events, memory. `streams` reaches it by `backend_of`."""

    def __init__(self, *, without: Collection[str] = (), keeps: bool = False) -> None:
        """Starts idle.

        Args:
          without: lines of code whose waits are left out: a mutation.
          keeps: hold on to all tensors, for `replay`; freed memory is then not looked at.
        """
        self.without = without
        self.keeps = keeps
        self.clocks: dict[str, Clock] = {HOST: {}}
        self.races: list[str] = []
        self.host_reads: list[str] = []
        self.log: list[tuple[str, str]] = []
        self.skipped = 0
        self.num_buffers = 0
        self.nodes: list[Node] = []
        self._last: dict[str, Node] = {}
        self._memories: dict[int, Memory] = {}
        self._freed: dict[str, list[Memory]] = {}
        self._first: dict[int, tuple[Any, Tensor]] = {}
        self.training = QueuedStream(self, "train")
        self._current = self.training
        self._num_streams = 0

    # The part of a backend.

    def stream(self) -> QueuedStream:
        pair, place = divmod(self._num_streams, 2)  # as rings make them
        self._num_streams += 1
        return QueuedStream(self, f"{('copy', 'score')[place]} {pair}")

    def current_stream(self, device: torch.device | None = None) -> QueuedStream:
        return self._current

    def other_stream(self) -> QueuedStream:
        """Returns a stream of the consumer's."""
        return QueuedStream(self, f"train {len(self.clocks)}")

    @contextmanager
    def use(self, stream: QueuedStream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def mark(self, stream: QueuedStream) -> QueuedEvent:
        return stream.record_event()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype)
        self._track(tensor, "pinned", None)
        return tensor

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.num_buffers += 1
        tensor = torch.zeros(shape, dtype=dtype)
        self._track(tensor, f"buffer {self.num_buffers}", self._current.name)
        return tensor

    # The part of a test.

    def put(self, *modules: torch.nn.Module) -> None:
        """Has the modules' tensors lie on the device, allocated on the current stream."""
        for module in modules:
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                self._track(tensor, name, self._current.name)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watches all ops of the block."""
        with _Reads(self), _Ops(self):
            yield
        self._sweep()

    @torch.no_grad()
    def replay(self, seed: int) -> None:
        """Computes everything again, in a random order that the waits allow.

        One stream is far ahead of the others at times, and late at others.
        """
        rng = random.Random(seed)
        for storage, content in self._first.values():
            torch.empty(0, dtype=torch.uint8).set_(storage).copy_(content)
        left = {id(node): len({id(each) for each in node.before}) for node in self.nodes}
        followers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for other in {id(each): each for each in node.before}.values():
                followers.setdefault(id(other), []).append(node)
        ready = [node for node in self.nodes if not left[id(node)]]
        favour = {name: rng.random() for name in self.clocks}
        done = 0
        while ready:
            if rng.random() < 0.02:
                favour = {name: rng.random() for name in self.clocks}
            node = max(ready, key=lambda each: favour[each.stream])
            ready.remove(node)
            done += 1
            if node.call is not None:
                _run_again(*node.call)
            for other in followers.get(id(node), ()):
                left[id(other)] -= 1
                if not left[id(other)]:
                    ready.append(other)
        assert done == len(self.nodes)

    # Called by streams, events and modes.

    def skips(self) -> bool:
        """Returns whether the wait that is made two frames up is to be left out."""
        frame = sys._getframe(2)
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        is_mutated = line.split("  #")[0] in self.without
        self.skipped += is_mutated
        return is_mutated

    def tick(self, stream: str, *also: Node, call: Any = None) -> Node:
        """Moves a stream on, after its own work and the host's so far."""
        clock = self.clocks[stream]
        _join(clock, self.clocks[HOST])
        clock[stream] = clock.get(stream, 0) + 1
        before = [self._last[name] for name in (stream, HOST) if name in self._last]
        node = Node(stream, [*before, *also], call)
        self._last[stream] = node
        if self.keeps:
            self.nodes.append(node)
        return node

    def order(self, stream: str, *, after: QueuedEvent) -> None:
        """Has the stream, or the host, go on only after the event."""
        self.log.append((stream, "waits"))
        _join(self.clocks[stream], after.clock)
        self.tick(stream, after.node)

    def is_here(self, tensor: Tensor) -> bool:
        """Returns whether a tensor lies on the device."""
        memory = self._memories.get(_id_of(tensor))
        return memory is not None and memory.owner is not None

    def asked_for_value(self, tensor: Tensor) -> None:
        """Notes a value that the host reads: of the device it must not, of pinned memory it may."""
        if self.is_here(tensor):
            frame = sys._getframe(2)
            while frame is not None and "jest_stream/" not in frame.f_code.co_filename:
                frame = frame.f_back
            # Selection checks values where tensors lie on a CPU, as these do; that it does not
            # where they lie elsewhere is what test_selection_device shows.
            if frame is not None and "/selection/" not in frame.f_code.co_filename:
                self.host_reads.append(f"{frame.f_code.co_name}, line {frame.f_lineno}")
        elif memory := self._memories.get(_id_of(tensor)):
            self.tick(HOST)
            self._access(memory, HOST, is_write=False)

    def op(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Computes an op, and notes who reads and writes what."""
        self._sweep()
        if function is torch.ops.aten._local_scalar_dense.default:
            return function(*args, **kwargs)  # noted above
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {_id_of(tensor): tensor for tensor in inputs}
        if not known.keys() & self._memories.keys():
            return function(*args, **kwargs)  # of ordinary memory: the host's own business
        is_queued = any(self.is_here(tensor) for tensor in inputs)
        stream = self._current.name if is_queued else HOST
        if self.keeps:
            for tensor in known.values():
                self._remember(tensor)
        written = {_id_of(tensor) for tensor in _written(function, args, kwargs)}
        outputs = function(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        is_view = not written and any(_id_of(tensor) in known for tensor in results)
        if is_view:
            return outputs
        self.tick(stream, call=(function, args, kwargs, outputs) if self.keeps else None)
        self.log.append((stream, function.overloadpacket.__name__))
        if is_queued:
            self._reuse(stream)
            for tensor in [*results, *(known[key] for key in written)]:
                if _id_of(tensor) not in self._memories:
                    self._track(tensor, function.overloadpacket.__name__, stream)
        for key in known.keys() | {_id_of(tensor) for tensor in results}:
            if memory := self._memories.get(key):
                self._access(memory, stream, is_write=key in written or key not in known)
        return outputs

    def _track(self, tensor: Tensor, name: str, owner: str | None) -> None:
        storage = tensor.untyped_storage()
        self._memories[storage._cdata] = Memory(name, owner, StorageWeakRef(storage))
        self._remember(tensor)

    def _remember(self, tensor: Tensor) -> None:
        """Keeps what a memory holds when it is first seen, for `replay`."""
        storage = tensor.untyped_storage()
        if self.keeps and storage._cdata not in self._first:
            with _disable_current_modes():
                content = torch.empty(0, dtype=torch.uint8).set_(storage).clone()
            self._first[storage._cdata] = (storage, content)

    def _access(self, memory: Memory, stream: str, *, is_write: bool, verb: str = "") -> None:
        clock = self.clocks[stream]
        for others, what in ((memory.writes, "writes"), (memory.reads, "reads")):
            if what == "reads" and not is_write:
                continue
            for other, tick in others.items():
                if other != stream and clock.get(other, 0) < tick:
                    mine = verb or ("writes" if is_write else "reads")
                    self.races.append(f"{stream} {mine} {memory.name} while {other} {what} it")
        (memory.writes if is_write else memory.reads)[stream] = clock.get(stream, 0)

    def _sweep(self) -> None:
        if self.keeps:
            return
        for key in [key for key, each in self._memories.items() if each.alive.expired()]:
            memory = self._memories.pop(key)
            if memory.owner is not None:
                self._freed.setdefault(memory.owner, []).append(memory)

    def _reuse(self, stream: str) -> None:
        for memory in self._freed.pop(stream, ()):
            self._access(memory, stream, is_write=True, verb="reuses")


class _Ops(TorchDispatchMode):
    def __init__(self, device: QueuedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._device.op(func, args, kwargs or {})


class _Reads(TorchFunctionMode):
    def __init__(self, device: QueuedDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READERS:
            self._device.asked_for_value(args[0])
        return func(*args, **(kwargs or {}))


def _run_again(function: Any, args: Any, kwargs: Any, outputs: Any) -> None:
    again = function(*args, **kwargs)
    for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Returns the arguments that an op writes to, by its schema."""
    found: list[Any] = []
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found.extend(tree_leaves(value))
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _join(clock: Clock, other: Clock) -> None:
    for name, tick in other.items():
        clock[name] = max(clock.get(name, 0), tick)


def _id_of(tensor: Tensor) -> int:
    cdata: int = tensor.untyped_storage()._cdata
    return cdata
