"""One run, step by step: what is read, scored, chosen and handed out, and when.

`build` wires the stages for one rank, `schedule` says which of them runs at which step, and `state`
describes where a run is. Everything here runs in the training thread.
"""

from jest_stream.pipeline.batches import structured
from jest_stream.pipeline.build import RunInputs, build, describe, open_inputs
from jest_stream.pipeline.distributed import gather_state_dict, rank_and_world_size
from jest_stream.pipeline.iterator import JESTIterator
from jest_stream.pipeline.schedule import Pipeline

__all__ = [
    "JESTIterator",
    "Pipeline",
    "RunInputs",
    "build",
    "describe",
    "gather_state_dict",
    "open_inputs",
    "rank_and_world_size",
    "structured",
]
