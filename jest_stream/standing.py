"""Where a run is between two batches: what a call that Ctrl-C ends halfway must leave alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from jest_stream.checkpoint import Record
from jest_stream.ledger import Scored
from jest_stream.superbatch import SuperBatch


@dataclass
class Standing:
    """What changes as batches are handed out. Owned by a `Pipeline`."""

    step: int = 0
    """Batches handed out."""
    epoch: int = 0
    """Passes begun before this one, where `repeat=False`."""
    epoch_step: int = 0
    """Batches handed out in this epoch; 0 again as soon as it is complete, where its length is
    known before."""
    epoch_batches: int | None = None
    """Batches of this pass, where that was computed beforehand."""
    in_flight: deque[Scored] = field(default_factory=deque)
    """Super-batches that were chosen from and not handed out, the next one first."""
    restored: list[Record] = field(default_factory=list)
    """Those of a checkpoint that were not yet read again; they come behind."""
    tail: SuperBatch | None = None
    """Too small for a batch: where a pass has ended."""
    is_resumed: bool = False
    """Whether a checkpoint was loaded and nothing handed out since."""
    has_begun: bool = False
    """Whether a batch was handed out or a checkpoint loaded."""

    def copy(self) -> Standing:
        """Returns the same, on its own from now on."""
        return replace(self, in_flight=self.in_flight.copy(), restored=self.restored.copy())
