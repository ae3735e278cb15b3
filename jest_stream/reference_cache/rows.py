"""Finds embeddings of one shard by key: in the order of its examples at no cost, else looked up.

A reader goes through a shard from some example on. The next example's row is nearly always the next
one in the file, perhaps a few further on where examples were left out; only where it is neither is
an index of keys made, or mapped. The keys of one record batch are in memory at a time. Used by one
thread of one process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
from torch import Tensor

from jest_stream.reference_cache.files import EmbeddingsFile, RecordBatch
from jest_stream.reference_cache.index import KeyIndex, key_hashes, make_index
from jest_stream.types import ReferenceRow

_NEAR = 256  # rows before and after the expected one that are searched before the index
_MAX_FILES = 4  # files mapped at once, of a shard in several parts


class ShardRows:
    """Finds the embeddings of one shard's examples.

    Args:
      sizes: examples in each part.
      open_part: maps a part.
      open_index: maps the index over parts; None where it is made of the keys when needed.
      first: examples of the shard that come before the first one to be taken.
    """

    def __init__(
        self,
        sizes: list[int],
        open_part: Callable[[int], EmbeddingsFile],
        open_index: Callable[[], KeyIndex] | None,
        first: int,
    ) -> None:
        self._sizes = sizes
        self._open_part = open_part
        self._open_index = open_index
        self._files: OrderedDict[int, EmbeddingsFile] = OrderedDict()
        self._index: KeyIndex | None = None
        self._place: tuple[int, int] | None = None  # part and number of the batch at hand
        # Columns of the record batch at hand; before the first, none.
        self._keys, *self._values = RecordBatch([], Tensor(), Tensor(), Tensor())
        self._row = 0  # the next in it
        self._go_to_example(first)

    def take(self, key: str) -> ReferenceRow | None:
        """Returns the place of an example's embeddings; None if it is not cached.

        The tensors are the mapped file itself: gather rows while the shard is at hand.
        """
        # Nearly always the next row has the key: one comparison of strings, and no search.
        row = self._row
        if row >= len(self._keys) or self._keys[row] != key:
            if not self._find(key):
                return None
            row = self._row
        self._row = row + 1
        image, text, checksums = self._values
        return image, text, checksums, row

    def _find(self, key: str) -> bool:
        """Goes to the row of a key; False if there is none."""
        # There are three cases, from cheap to dear: 1. the key is the first of the next record
        # batch; 2. it is near, since examples were left out here or there; 3. it is anywhere, as
        # in a shuffled stream, or nowhere: then the reader stays at the row where it was.
        row = self._row
        if row == len(self._keys) and self._go_to_next_batch():
            row = 0
        if row < len(self._keys) and self._keys[row] == key:
            self._row = row
            return True
        low, high = max(row - _NEAR, 0), min(row + _NEAR, len(self._keys))
        if key in self._keys[low:high]:
            self._row = self._keys.index(key, low, high)
            return True
        # The index knows hashes: another key may have the same one, so the key itself decides.
        before = self._place, self._row
        for part, row in self._index_of_keys().places(key):
            self._go_to(part, row)
            if self._keys[self._row] == key:
                return True
        if before[0] is not None and before[0] != self._place:
            self._open_batch(*before[0])
        self._row = before[1]
        return False

    def _go_to_example(self, position: int) -> None:
        """Goes to the row that an example has if none was left out.

        If some were, its row is a little earlier, and `take` finds it nearby.
        """
        # Parts of 20 and 20 rows: position 25 is row 5 of part 1; position 40 is past the end.
        for part, size in enumerate(self._sizes):
            if position < size:
                self._go_to(part, position)
                return
            position -= size
        if self._sizes and self._sizes[-1]:
            self._go_to(len(self._sizes) - 1, self._sizes[-1] - 1)
            self._row += 1

    def _go_to(self, part: int, row: int) -> None:
        # Batches that start at rows 0, 8192 and 16384: row 9000 is row 808 of batch 1.
        starts = self._file(part).starts
        number = int(np.searchsorted(starts, row, side="right")) - 1
        if self._place != (part, number):
            self._open_batch(part, number)
        self._row = row - starts[number]

    def _go_to_next_batch(self) -> bool:
        part, number = (0, -1) if self._place is None else self._place
        while part < len(self._sizes):
            number += 1
            if number < self._file(part).num_batches:
                self._open_batch(part, number)
                return True
            part, number = part + 1, -1
        return False

    def _open_batch(self, part: int, number: int) -> None:
        self._keys, *self._values = self._file(part).batch(number)
        self._place, self._row = (part, number), 0

    def _file(self, part: int) -> EmbeddingsFile:
        if part not in self._files:
            self._files[part] = self._open_part(part)
            if len(self._files) > _MAX_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(part)
        return self._files[part]

    def _index_of_keys(self) -> KeyIndex:
        if self._index is None and self._open_index is not None:
            self._index = self._open_index()
        elif self._index is None:
            files = map(self._file, range(len(self._sizes)))
            self._index = make_index([key_hashes(file.keys()) for file in files])
        return self._index
