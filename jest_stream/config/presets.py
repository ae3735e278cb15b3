"""Names published methods of selection, as settings: `JESTDataset(..., **preset("jest"))`.

Each holds its paper's rule and ratio. Batch sizes, learning rates and models are the user's; where
they are part of the recipe, the comment names them.
"""

from __future__ import annotations

import math
from typing import TypedDict

from jest_stream.config.selection import SelectionConfig
from jest_stream.errors import ConfigError


class Preset(TypedDict):
    """Arguments of `JESTDataset`."""

    selection: SelectionConfig
    filter_ratio: float


_PRESETS: dict[str, Preset] = {
    # Evans et al. 2024, https://arxiv.org/abs/2406.17711: 16 chunks, raw sums, 80 % discarded, a
    # batch of 32,768, and a reference of the learner's size trained on a small curated set.
    "jest": {
        "selection": SelectionConfig(method="joint", score="learnability", num_chunks=16),
        "filter_ratio": 0.8,
    },
    # SigLIP 2, https://arxiv.org/abs/2502.14786, after ACID (https://arxiv.org/abs/2411.18674):
    # a last phase of training for its small models, at learning rate 1e-5 without weight decay and
    # with a larger reference (So400m). 32k of 64k are kept; B/32 discards 75 %: pass
    # filter_ratio=0.75 for that. `start_step` serves runs that hold both phases.
    "siglip2_acid": {
        "selection": SelectionConfig(method="joint", score="learnability", loss="sigmoid"),
        "filter_ratio": 0.5,
    },
    # Evans et al., ECCV 2024, https://arxiv.org/abs/2312.05328: independent scores, sampled by
    # their softmax. With the softmax loss an example's own score is the difference of its dot
    # products. The paper's learner is a small proxy: pass it as learner=.
    "activeclip": {
        "selection": SelectionConfig(method="independent", score="learnability", loss="softmax"),
        "filter_ratio": 0.5,
    },
    # Mindermann et al., ICML 2022, https://arxiv.org/abs/2206.07137: the tenth with the largest
    # reducible holdout loss, without sampling. Its reference is trained on a holdout set.
    "rho_loss": {
        "selection": SelectionConfig(method="independent", score="learnability", gain=math.inf),
        "filter_ratio": 0.9,
    },
    # No selection. The ratio names the run to compare with: the same shards, lane by lane, as for
    # "jest", but batch by batch.
    "uniform": {"selection": SelectionConfig(method="uniform"), "filter_ratio": 0.8},
}


def preset(name: str) -> Preset:
    """Returns the settings of a published method, as arguments of `JESTDataset`.

    Args:
      name: "jest", "siglip2_acid", "activeclip", "rho_loss" or "uniform". To change a part of one,
        `dataclasses.replace(preset("jest")["selection"], num_chunks=32)`.

    Raises:
      ConfigError: if the name is none of these.
    """
    if name not in _PRESETS:
        known = ", ".join(repr(known) for known in _PRESETS)
        raise ConfigError(f"preset must be one of {known}, got {name!r}")
    return _PRESETS[name].copy()
