"""Scoring beside training on one device: slots, streams, events, and choices still on their way."""

from jest_stream.pipeline.device.choice import Choice
from jest_stream.pipeline.device.streams import Ring, Slot, moved

__all__ = [
    "Choice",
    "Ring",
    "Slot",
    "moved",
]
