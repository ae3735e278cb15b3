"""Embeds tensors of pairs with two-tower models: `Embeddings` come out.

    two_tower.py        every library's models, seen in one way
    learner.py          the copy of the module being trained, refreshed by step count
    reference.py        the frozen reference
    named_reference.py  references by name, from open_clip
    score_size.py       scoring with fewer image tokens, fitted to one model
    image_towers.py     where each library's vision transformer keeps its sizes
    resampling.py       weights at another size, as linear maps
    tokens.py           the image tokens that are kept
    at_score_size.py    the learner trained at the score size, with its own weights

Everything runs in the thread that calls it.
"""

from jest_stream.scoring.at_score_size import at_score_size
from jest_stream.scoring.learner import LearnerCopy, embed_once
from jest_stream.scoring.named_reference import is_named, load_reference
from jest_stream.scoring.reference import ReferenceModel
from jest_stream.scoring.two_tower import Input, Pixels, has_bias, two_tower, unwrap

__all__ = [
    "Input",
    "LearnerCopy",
    "Pixels",
    "ReferenceModel",
    "at_score_size",
    "embed_once",
    "has_bias",
    "is_named",
    "load_reference",
    "two_tower",
    "unwrap",
]
