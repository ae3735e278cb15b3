"""How much is to be learned from each pair: two-tower models in, `Embeddings` out.

`encoders` sees every library's models in one way, `learner` keeps the copy of the module being
trained, `reference` holds the frozen one; `streams` has all of it run beside training on CUDA.
Scoring with fewer image tokens: `score_size` fits a model to the setting, `towers` knows where each
library keeps its sizes, `resampling` and `tokens` are what is done, and `shared` trains the learner
at that size.
"""

from jest_stream.scoring.encoders import (
    Input,
    Pixels,
    TwoTower,
    embed_in_micro_batches,
    has_bias,
    two_tower,
    unwrap,
)
from jest_stream.scoring.forward import embed_once
from jest_stream.scoring.learner import LearnerCopy
from jest_stream.scoring.named import is_named, load_reference
from jest_stream.scoring.reference import ReferenceModel
from jest_stream.scoring.shared import at_score_size

__all__ = [
    "Input",
    "LearnerCopy",
    "Pixels",
    "ReferenceModel",
    "TwoTower",
    "at_score_size",
    "embed_in_micro_batches",
    "embed_once",
    "has_bias",
    "is_named",
    "load_reference",
    "two_tower",
    "unwrap",
]
