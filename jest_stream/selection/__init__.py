"""Which examples to train on, given how two models see them.

Embeddings of B candidates go in, the indices of b chosen ones come out, in draw order, with their
scores. `select_jointly` is JEST: every chunk is drawn given the chunks before. The other two are
its baselines. Functions named `select_...` take a `torch.Generator` and return indices;
`..._selection` take a key and a step, and return a `Selection`.

    joint.py        joint selection, from embeddings to indices
    drawing.py      the loop over chunks
    conditional.py  the running scores that the loop is driven by
    losses.py       pair losses, in tiles that stay in cache
    scores.py       learnability and other scores
    targets.py      similarity to target embeddings, a term of the score
    sampling.py     drawing without replacement, its noise and its probabilities
    quotas.py       floors, caps and shares of groups
    baselines.py    independent and uniform selection
    cost.py         what choosing costs
    checks.py       what the user passed, checked

Pure functions: no state, no process groups, no global randomness.
"""

from jest_stream.selection.baselines import (
    independent_selection,
    select_independently,
    select_uniformly,
    uniform_selection,
)
from jest_stream.selection.cost import choice_flops, num_conditioned_on, selection_flops
from jest_stream.selection.drawing import DrawRule
from jest_stream.selection.joint import joint_selection, select_jointly
from jest_stream.selection.quotas import Groups
from jest_stream.selection.sampling import draw_key, effective_support, gumbel_noise, gumbel_top_k
from jest_stream.selection.scores import (
    WeightedScore,
    easy_reference,
    hard_learner,
    learnability,
    needs,
)
from jest_stream.selection.targets import target_similarity

__all__ = [
    "DrawRule",
    "Groups",
    "WeightedScore",
    "choice_flops",
    "draw_key",
    "easy_reference",
    "effective_support",
    "gumbel_noise",
    "gumbel_top_k",
    "hard_learner",
    "independent_selection",
    "joint_selection",
    "learnability",
    "needs",
    "num_conditioned_on",
    "select_independently",
    "select_jointly",
    "select_uniformly",
    "selection_flops",
    "target_similarity",
    "uniform_selection",
]
