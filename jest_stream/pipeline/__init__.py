"""Carries a run out, step by step: examples are read, scored, selected and handed out as batches.

`build` wires the stages for one rank and `schedule` runs them: `super_batches` reads, `selector`
scores and selects, `batches` hands out, `state` holds the run's progress and its checkpoints. All
of it runs in the training thread.
"""

from jest_stream.pipeline.batches import structured
from jest_stream.pipeline.build import build, describe, open_inputs
from jest_stream.pipeline.distributed import gather_state_dict, rank_and_world_size
from jest_stream.pipeline.iterator import JESTIterator
from jest_stream.pipeline.schedule import Pipeline

__all__ = [
    "JESTIterator",
    "Pipeline",
    "build",
    "describe",
    "gather_state_dict",
    "open_inputs",
    "rank_and_world_size",
    "structured",
]
