"""jest_stream: joint example selection (JEST) inside the training loop.

shards -> lanes -> super-batch -> score views -> embeddings -> selected -> batch

sources     read shards lane by lane, here or in worker processes
superbatch  cuts the stream into super-batches of exactly B candidates
views       makes the small view that is scored, and the one that is trained on
scoring     embeds candidates with the learner copy and the frozen reference
selection   draws the sub-batch, chunk by chunk, each conditioned on those before
dataset     hands it to the training loop, and remembers where it was
"""

from jest_stream.config import (
    Limits,
    Quota,
    ScoringConfig,
    SelectionConfig,
    StorageConfig,
    TargetSimilarity,
    Term,
    preset,
)
from jest_stream.dataset import JESTDataset
from jest_stream.metrics import RunCost, training_flops
from jest_stream.pipeline import gather_state_dict
from jest_stream.reference_cache import ReferenceCache
from jest_stream.scoring import at_score_size
from jest_stream.selection import (
    Groups,
    WeightedScore,
    gumbel_top_k,
    select_independently,
    select_jointly,
    select_uniformly,
)
from jest_stream.sources import HuggingFaceSource, IterableSource, TarSource, open_source
from jest_stream.types import Embeddings

__version__ = "0.1.0"

__all__ = [
    "Embeddings",
    "Groups",
    "HuggingFaceSource",
    "IterableSource",
    "JESTDataset",
    "Limits",
    "Quota",
    "ReferenceCache",
    "RunCost",
    "ScoringConfig",
    "SelectionConfig",
    "StorageConfig",
    "TarSource",
    "TargetSimilarity",
    "Term",
    "WeightedScore",
    "at_score_size",
    "gather_state_dict",
    "gumbel_top_k",
    "open_source",
    "preset",
    "select_independently",
    "select_jointly",
    "select_uniformly",
    "training_flops",
]
