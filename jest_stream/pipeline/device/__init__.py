"""Scores beside training on one device: slots, streams, events, and selections on their way."""

from jest_stream.pipeline.device.pending import PendingSelection
from jest_stream.pipeline.device.streams import Ring, Slot, moved

__all__ = [
    "PendingSelection",
    "Ring",
    "Slot",
    "moved",
]
