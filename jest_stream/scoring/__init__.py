"""Embeds tensors of pairs with two-tower models: `Embeddings` come out.

    two_tower.py        one interface to the models of all libraries
    learner.py          the copy of the module being trained, refreshed by step count
    reference.py        the frozen reference
    named_reference.py  references by name, from open_clip
    score_size.py       scoring with fewer image tokens, fitted to one model
    image_towers.py     the vision transformers of each library, and how they are resized
    resampling.py       weights at another size, as linear maps
    tokens.py           the image tokens that are kept
    at_score_size.py    the learner's weights, trained at the score size too

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
