"""A forward pass of the learner as it is, for counting what it costs: not for scoring.

The module being trained goes in; a stand-in runs, so that nothing of the learner changes. It has
the learner's own weights, not copies of them, so that it takes no memory to speak of.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from jest_stream.errors import ConfigError
from jest_stream.scoring.encoders import Input, embed_in_micro_batches, two_tower
from jest_stream.types import Embeddings


def embed_once(learner: nn.Module, image: Input, text: Input) -> Embeddings:
    """Returns what the learner makes of B pairs, in eval mode and without gradients.

    The learner's mode, buffers and gradients stay. Forward hooks are part of what a module
    computes, so they run.

    Raises:
      ConfigError: for a learner without values or whose weights are sharded over ranks: its
        forward pass would wait for the others.
    """
    tower = two_tower(learner)
    stand_in = two_tower(_stand_in(tower.module))
    return embed_in_micro_batches(stand_in, image, text, device=tower.device)


def _stand_in(module: nn.Module) -> nn.Module:
    """Returns a copy of the modules around the same parameters, in eval mode."""
    known = {}
    for name, parameter in module.named_parameters():
        if torch.nn.parameter.is_lazy(parameter) or parameter.is_meta:
            raise ConfigError(f"{name} of the learner has no values yet")
        if hasattr(parameter, "full_tensor"):
            raise ConfigError(f"{name} of the learner is sharded over ranks (fully_shard)")
        if type(parameter) is nn.Parameter:
            shared = nn.Parameter(parameter.detach(), requires_grad=False)
            known[id(parameter)] = shared
    # Whatever `known` holds is taken instead of being copied; buffers are copied, since some
    # modules write to theirs in eval mode too.
    with torch.inference_mode(False), torch.no_grad():
        return copy.deepcopy(module, known).eval()
