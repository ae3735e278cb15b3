"""Selects examples: embeddings of B candidates go in, the indices of the b chosen come out.

`select_jointly` is JEST: every chunk is drawn given the chunks before. The other two `select_...`
functions are its baselines. They take a `torch.Generator` and return indices in draw order; their
`..._selection` twins take a key and a step, and return a `Selection` with scores and weights.

    joint.py        joint selection, from embeddings to indices
    drawing.py      the loop over chunks
    conditional.py  the running scores that drive the loop
    losses.py       pair losses, in tiles that stay in cache
    scores.py       learnability and other scores
    targets.py      similarity to target embeddings, a term of the score
    sampling.py     drawing without replacement, its noise and its probabilities
    quotas.py       floors, caps and shares of groups
    baselines.py    independent and uniform selection
    cost.py         FLOPs of a choice
    checks.py       checks of the user's arguments

Pure functions: no state, no process groups, no global randomness.
"""

from jest_stream.selection.baselines import (
    independent_selection,
    select_independently,
    select_uniformly,
    uniform_selection,
)
from jest_stream.selection.cost import choice_flops
from jest_stream.selection.drawing import DrawRule
from jest_stream.selection.joint import joint_selection, select_jointly
from jest_stream.selection.quotas import Groups
from jest_stream.selection.sampling import gumbel_top_k
from jest_stream.selection.scores import WeightedScore, needs
from jest_stream.selection.targets import target_similarity

__all__ = [
    "DrawRule",
    "Groups",
    "WeightedScore",
    "choice_flops",
    "gumbel_top_k",
    "independent_selection",
    "joint_selection",
    "needs",
    "select_independently",
    "select_jointly",
    "select_uniformly",
    "target_similarity",
    "uniform_selection",
]
