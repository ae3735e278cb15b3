"""Reads any iterable of examples as one shard and one lane, in the iterable's order.

In: dicts (`__key__` optional) or ready `(image, text)` pairs. Out: examples. Sequences and
map-style datasets resume by index, everything else by skipping; an iterator that cannot start over
gives one pass. Runs where the lane is read, here or in one worker. No threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jest_stream.errors import BadExampleError, ConfigError
from jest_stream.types import Example, Source


class IterableSource(Source):
    """Reads examples from an iterable or a map-style dataset, in its own order.

    It may be a `torch.utils.data.Dataset` or `IterableDataset`, a `webdataset.WebDataset` or
    `DataPipeline`, a list, a generator, ... Compared with `TarSource` and `HuggingFaceSource` it
    has limits:

    - It is one shard: one lane and at most one worker process read it, and one rank. Nothing is
      shuffled or mixed here.
    - Lists and map-style datasets resume by index. Everything else resumes by iterating anew and
      passing over the examples before, which takes as long as reading them did, and is exact only
      if the same examples come again: not with an unseeded shuffle, such as webdataset's
      `.shuffle()` or `resampled=True`.
    - An iterator or generator gives one pass, in one process, and cannot resume in another.
    - It is trusted. webdataset takes a tar that was cut for a shorter one, and its `.decode()` and
      `pipe:` run the code they are given; here bytes are decoded by an allow-list. Pass it
      undecoded.
    - In a worker process `torch.utils.data.get_worker_info()` is None, since one reads it all.

    Args:
      iterable: of dicts or of `(image, text)` pairs, not of batches. A pair becomes
        `{"image": ..., "text": ...}`; keys that are missing are made from the position.

    Raises:
      ConfigError: if it cannot be iterated.
    """

    def __init__(self, iterable: Any) -> None:
        self._is_indexed = _is_indexed(iterable)
        if not self._is_indexed and not isinstance(iterable, Iterable):
            hint = " If it makes one when called, call it." if callable(iterable) else ""
            raise ConfigError(
                f"source is a {_type_name(iterable)}, which cannot be iterated.{hint} Pass paths "
                "of tar shards, or an iterable of dicts or of (image, text) pairs."
            )
        self._iterable = iterable
        self._num_taken = 0  # of an iterator that cannot start over

    @property
    def num_shards(self) -> int:
        """1: an iterable cannot be read in parts."""
        return 1

    @property
    def fingerprint(self) -> str:
        """The type of the iterable: its content is not known before it is read."""
        return f"iterable:{_type_name(self._iterable)}"

    def shard_name(self, shard: int) -> str:
        """Returns the type of the iterable."""
        return f"<{_type_name(self._iterable)}>"

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the examples after the first `index`; see `types.Source`.

        Raises:
          ConfigError: for an item that is neither dict nor pair, and for an exhausted iterator.
        """
        del offset
        for item in self._items(index):
            yield _example(item, index), 0
            index += 1

    def _items(self, start: int) -> Iterator[Any]:
        """Yields the items of the iterable, from position `start` on."""
        # There are three kinds:
        # 1. Indexed: position `start` is read at once.
        # 2. One that starts over at each iter(): the first `start` items are passed over.
        # 3. An iterator, which is its own iter(): it stands at `_num_taken` and cannot go back.
        if self._is_indexed:
            for position in range(start, len(self._iterable)):
                yield self._iterable[position]
            return
        items = iter(self._iterable)
        is_one_shot = items is self._iterable
        if is_one_shot and start < self._num_taken:
            raise ConfigError(
                f"source is a {_type_name(items)}, which gives its examples once, and "
                f"{self._num_taken} are gone already; example {start} is asked for again. For a "
                "single pass use repeat=False, and iterate once. For more, pass an iterable that "
                "can start over: a list, or one whose __iter__ calls the generator function anew."
            )
        position = self._num_taken if is_one_shot else 0
        for item in items:
            position += 1
            if is_one_shot:
                self._num_taken = position
            if position > start:
                yield item

    def __repr__(self) -> str:
        return f"<IterableSource {_type_name(self._iterable)}>"


def _example(item: Any, index: int) -> Example:
    """Returns an item as an example; never the same dict, which belongs to the user."""
    # There are three cases: 1. a dict. 2. A pair, unless its second half is a list of texts: then
    # the iterable gives batches. 3. Anything else is no example.
    if isinstance(item, Mapping):
        return {**item, "__key__": str(item.get("__key__", index))}
    if isinstance(item, (tuple, list)) and len(item) == 2:
        if isinstance(item[1], (tuple, list)) and len(item[1]) > 0 and isinstance(item[1][0], str):
            raise ConfigError(
                f"source gives {len(item[1])} texts at once: it looks like batches, but examples "
                "are chosen one by one. Pass the dataset before batching."
            )
        return {"__key__": str(index), "image": item[0], "text": item[1]}
    size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
    raise ConfigError(
        f"source gives a {_type_name(item)}{size} at position {index}, but an example is a dict "
        'such as {"jpg": bytes, "txt": bytes}, or a pair (image, text). Map it to one of these.'
    )


def _is_indexed(iterable: Any) -> bool:
    """Tells whether position i can be read at once: sequences and map-style datasets."""
    has_index = hasattr(iterable, "__len__") and hasattr(iterable, "__getitem__")
    return has_index and (isinstance(iterable, Sequence) or not hasattr(iterable, "__iter__"))


def _type_name(value: Any) -> str:
    return type(value).__name__
