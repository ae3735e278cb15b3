"""jest_stream selects training data inside the training loop, by joint example selection (JEST).

shards -> lanes -> super-batch -> score views -> embeddings -> chosen rows -> batch

sources          read shards lane by lane into blocks of examples, in worker processes if wanted
views            make the small view of every candidate, and the train view of the chosen
reference_cache  brings reference embeddings beside the examples, where they were made before
scoring          embeds the candidates with the learner copy and the frozen reference
selection        draws the sub-batch, chunk by chunk, each conditioned on those before
pipeline         says which of these runs at which step, and describes where a run is
dataset          hands the batch to the training loop
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
