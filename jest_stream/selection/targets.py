"""Computes NormSim: how close candidates are to examples of the model's purpose.

Wang et al., NeurIPS 2024 (https://arxiv.org/abs/2405.19547). Pure functions.

B: candidates, T: targets, D: dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from jest_stream.errors import ConfigError

_BLOCK = 2**22  # similarities at a time: 16 MiB


def target_similarity(rows: Tensor, targets: Tensor, *, norm: float) -> Tensor:
    """Returns the norm of each row's cosines with all targets: `[B]` float32.

    Args:
      rows: `[B, D]` embeddings of the candidates, unit norm.
      targets: `[T, D]` embeddings of the targets, of any norm above 0, on the same device.
      norm: 2, or infinity for the largest cosine.

    Raises:
      ConfigError: if the dimensions differ.
    """
    if rows.shape[1] != targets.shape[1]:
        raise ConfigError(
            f"targets have dimension {targets.shape[1]}, the reference's embeddings "
            f"{rows.shape[1]}. Embed the targets with the reference, by the tower that is compared."
        )
    directions = normalize(targets.float(), dim=1).T
    found = rows.new_empty(len(rows), dtype=torch.float32)
    step = max(1, _BLOCK // len(targets))
    for start in range(0, len(rows), step):
        cosines = rows[start : start + step].float() @ directions
        found[start : start + step] = cosines.norm(dim=1) if norm == 2 else cosines.amax(1)
    return found
