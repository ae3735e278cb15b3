"""The nouns that the rooms hand to each other.

Shapes: B: super-batch size, b: batch size, D: embedding dimension, C: number of chunks,
G: number of groups with a quota.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from jest_stream.errors import BadExampleError

Example = dict[str, Any]
"""One image-text record: `__key__`, then one entry per member, encoded (bytes) or ready to use."""


REFERENCE_ROW = "__reference__"
"""Entry of an example that tells where its cached reference embeddings are: a `ReferenceRow`."""
ReferenceRow = tuple[Tensor, Tensor, Tensor, int]
"""`[n, D]` image and text embeddings and `[n, 2]` checksums of several examples, and which row is
this one's: rows are gathered together, many times faster than each alone."""


class Cursor(NamedTuple):
    """Where a lane goes on reading. Plain integers, so that a checkpoint can hold it."""

    epoch: int
    """Passes that the lane has completed."""
    shard: int
    """Position in the lane's shard order of this epoch."""
    offset: int
    """Where the next example starts within the shard: bytes in a tar, else unused."""
    num_before: int
    """Examples of the shard that lie before `offset`."""


class ObjectInfo(NamedTuple):
    """What names the content of an object, so that a change is noticed."""

    num_bytes: int
    """Its length."""
    version: str = ""
    """Its ETag, or whatever else names the content (a generation, a commit); "" if unknown."""


class Source(Protocol):
    """A fixed list of shards, each readable from any example on.

    Four members more are used where a source has them. `num_examples: Sequence[int] | None` says
    how many examples each shard holds, where that is known. `take_counts() -> dict[str, int]`
    returns what was counted in this process since the last call (bytes, retries, ...), for
    `metrics()`. `close()` closes what this process holds open beyond single reads: connections.
    `shard_content(shard) -> tuple[int, str]` returns what names the content of a shard now: its
    length in bytes, and its ETag or the like, "" if that is unknown.
    """

    @property
    def num_shards(self) -> int:
        """How many shards there are; the unit that lanes are dealt in."""

    @property
    def fingerprint(self) -> str:
        """Names the list of shards: a checkpoint of one list does not fit another."""

    def shard_name(self, shard: int) -> str:
        """What to call a shard in a message."""

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields each example from `offset` on, with the offset behind it.

        An example that cannot be used is yielded as the error that says why, not raised, so that
        reading can go on behind it; it counts as an example. A generator: closing it closes the
        file. `index` counts the examples before `offset`; sources that cannot seek skip that many.
        """


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What a two-tower model says of B image-text pairs.

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
    """Which candidates were chosen, and how sharply. All tensors stay on the scoring device."""

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
    """`[]` float: what `selected_score` would have been, had each chunk been drawn uniformly: the
    mean score of the candidates that were left; NaN for uniform."""
    group_counts: Tensor
    """`[G]` int64: how many were chosen of each group that has a quota."""
    quota_excess: Tensor
    """`[G]` int64: by how many that is above the group's quota or (negative) below it."""
    is_finite: Tensor
    """`[]` bool: whether every score was finite. Where it is False, `indices` mean nothing."""
