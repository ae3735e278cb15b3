"""Lets scoring run beside training on one device, by streams, events and persistent buffers.

`streams` holds the slots of super-batches and orders their uses, `pending` the selections that the
device may still be computing, `backends` the few calls that both make of a device.
"""

from jest_stream.pipeline.device.pending import PendingSelection
from jest_stream.pipeline.device.streams import Ring, Slot, moved

__all__ = [
    "PendingSelection",
    "Ring",
    "Slot",
    "moved",
]
