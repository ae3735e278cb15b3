"""Tests of selection take their embeddings from here: random ones, and ones with given logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from jest_stream.selection.sampling import gumbel_noise
from jest_stream.types import Embeddings


def random_embeddings(
    num_examples: int, dim: int = 16, *, seed: int, scale: float = 10.0, bias: float = -10.0
) -> Embeddings:
    """Returns unit-norm embeddings in which matching pairs are closer than others."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(num_examples, dim, generator=generator)
    text = image + torch.randn(num_examples, dim, generator=generator)
    return Embeddings(
        image=normalize(image), text=normalize(text), logit_scale=scale, logit_bias=bias
    )


def embeddings_with_logits(logits: list[list[float]]) -> Embeddings:
    """Returns unit-norm embeddings whose logits are these.

    Image i is the i-th unit vector, so that its logit with text j is scale * text[j][i]; one more
    coordinate, in which images are 0, gives each text its norm.
    """
    wanted = torch.tensor(logits)
    size = len(wanted)
    scale = float(wanted.norm(dim=0).max()) * 1.01
    text = wanted.T / scale
    rest = (1 - text.square().sum(1, keepdim=True)).sqrt()
    image = torch.eye(size, size + 1)
    return Embeddings(image=image, text=torch.cat((text, rest), dim=1), logit_scale=scale)


def noise_of(key: int, step: int, num_chunks: int, num_examples: int) -> Tensor:
    """Returns the noise that a selection uses, for the oracle: `[num_chunks, num_examples]`."""
    positions = torch.arange(num_examples)
    return torch.stack([gumbel_noise(key, step, chunk, positions) for chunk in range(num_chunks)])
