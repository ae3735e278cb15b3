"""Defines the types that the rooms hand to each other: examples, sources, embeddings, selections.

Shapes: B: super-batch size, b: batch size, D: embedding dimension, C: number of chunks,
G: number of groups with a quota.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from jest_stream.errors import BadExampleError

Example = dict[str, Any]
"""One image-text record: `__key__`, then one entry per member, encoded (bytes) or ready to use."""


REFERENCE_ROW = "__reference__"
"""Entry of an example that holds the place of its cached reference embeddings: a `ReferenceRow`."""
ReferenceRow = tuple[Tensor, Tensor, Tensor, int]
"""`[n, D]` image and text embeddings and `[n, 2]` checksums of several examples, and the row of
this one. Rows are gathered together, many times faster than each alone."""


class Cursor(NamedTuple):
    """The place where a lane goes on reading. Plain integers, which a checkpoint can hold."""

    epoch: int
    """Passes that the lane has completed."""
    shard: int
    """Position in the lane's shard order of this epoch."""
    offset: int
    """Start of the next example in the shard: a byte of a tar, a row of a table, else unused."""
    num_before: int
    """Examples of the shard that lie before `offset`."""


class ObjectInfo(NamedTuple):
    """Length and version of an object: a change of its content changes one of them."""

    num_bytes: int
    version: str = ""
    """ETag, generation or commit; "" if unknown."""


class Source(ABC):
    """A fixed list of shards, each readable from any example on.

    A source names its shards and reads them; the other members have defaults. Workers are sent a
    copy: a source must pickle. An object of another class with the abstract members, and
    any of the others, is a source too: `open_source` wraps it.
    """

    @property
    @abstractmethod
    def num_shards(self) -> int:
        """Number of shards, the unit that lanes are dealt in."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names the list of shards: a checkpoint of one list does not fit another."""

    @abstractmethod
    def shard_name(self, shard: int) -> str:
        """Returns the name of a shard in messages."""

    @abstractmethod
    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields each example from `offset` on, with the offset of the one that follows it.

        An example that cannot be used is yielded as the error that says why, not raised: reading
        goes on after it, and it counts as an example. A generator: closing it closes the file.

        Args:
          shard: position in the list of shards.
          offset: one that this method gave, or 0 for the start of the shard.
          index: number of examples before `offset`; sources that cannot seek skip that many.
        """

    @property
    def num_examples(self) -> Sequence[int] | None:
        """Examples of each shard; None where that is not known."""
        return None

    def shard_content(self, shard: int) -> tuple[int, str] | None:
        """Returns length in bytes and ETag (or "") of a shard; None where a shard has no bytes.

        A cache of reference embeddings notices changed shards by them.
        """
        return None

    def take_counts(self) -> dict[str, int]:
        """Returns the counts (bytes, retries, ...) of this process since the last call."""
        return {}

    def close(self) -> None:
        """Closes the connections of this process; reading opens them anew."""
        return None  # most sources hold none


class WrappedSource(Source):
    """A source that passes every call on to another one. Subclasses change some of the answers."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def num_shards(self) -> int:
        """Shards of the wrapped source."""
        return self._source.num_shards

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the wrapped source."""
        return self._source.fingerprint

    def shard_name(self, shard: int) -> str:
        """Returns the wrapped source's name of a shard."""
        return self._source.shard_name(shard)

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the wrapped source's examples; see `Source.read`."""
        return self._source.read(shard, offset=offset, index=index)

    @property
    def num_examples(self) -> Sequence[int] | None:
        """Examples of each shard, where the wrapped source knows them."""
        return self._source.num_examples

    def shard_content(self, shard: int) -> tuple[int, str] | None:
        """Returns length and ETag of a shard of the wrapped source."""
        return self._source.shard_content(shard)

    def take_counts(self) -> dict[str, int]:
        """Returns the wrapped source's counts since the last call."""
        return self._source.take_counts()

    def close(self) -> None:
        """Closes the connections of the wrapped source."""
        self._source.close()


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Embeddings of B image-text pairs by a two-tower model.

    The logit of image i and text j is `logit_scale * image[i] @ text[j] + logit_bias`.
    """

    image: Tensor
    """`[B, D]`, unit-norm rows."""
    text: Tensor
    """`[B, D]`, unit-norm rows; row i belongs to image i."""
    logit_scale: Tensor | float
    """Multiplier, already exponentiated; a 0-d tensor or a number."""
    logit_bias: Tensor | float = 0.0
    """Offset, with open_clip's sign: the paper's beta is `-logit_bias`."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The chosen candidates, with statistics of their draws. Tensors stay on the scoring device."""

    indices: Tensor
    """`[b]` int64, distinct, in draw order, chunk by chunk."""
    weights: Tensor
    """`[b]` float: 1 / probability of having been drawn, scaled to mean 1 within each draw. Means
    under them estimate means over all candidates; the greedier the draw, the less so. After sweeps
    the probability is that of the last draw, given all other chunks."""
    effective_support: Tensor
    """`[C]` float: 1 / sum(p^2) of each chunk's sampling distribution when drawn last; 1 is
    greedy."""
    selected_score: Tensor
    """`[]` float: mean over the chosen of their score when drawn last, in nats; NaN for uniform.
    Without sweeps every pair of two chunks counts once in it, with sweeps twice."""
    candidate_score: Tensor
    """`[]` float: the value that `selected_score` would have if each chunk had been drawn
    uniformly: the mean score of the candidates that were left. NaN for uniform."""
    group_counts: Tensor
    """`[G]` int64: how many were chosen of each group that has a quota."""
    quota_excess: Tensor
    """`[G]` int64: by how many that is above the group's quota or (negative) below it."""
    is_finite: Tensor
    """`[]` bool: whether every score was finite. Where it is False, `indices` mean nothing."""
