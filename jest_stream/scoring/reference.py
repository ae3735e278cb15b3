"""The reference model: a frozen two-tower module that says which pairs can be learned.

Its dimension, resolution and tokenizer may differ from the learner's, since only the scores of
pairs are compared. It runs in the thread that calls it.
"""

from __future__ import annotations

import torch
from torch import nn

from jest_stream.errors import ConfigError
from jest_stream.scoring.encoders import Input, embed_in_micro_batches, two_tower
from jest_stream.types import Embeddings


class ReferenceModel:
    """A frozen module that is taken over: moved to the scoring device and kept in eval mode.

    It is never trained and runs without gradients, so its `requires_grad` is left alone.

    Attributes:
      tower: the module, as a `TwoTower`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        device: torch.device | str | None = None,
        learner: nn.Module | None = None,
    ) -> None:
        """Takes `module` over.

        Args:
          module: any two-tower module, see `two_tower`.
          device: where it runs from now on. None: where it is.
          learner: the module being trained, which must not share parameters with `module`.

        Raises:
          ConfigError: if it is no two-tower module, or moves with the learner.
        """
        self.tower = two_tower(module, role="reference")
        if learner is not None:
            _check_independent(self.tower.module, learner)
        self.tower.module.to(device=device).eval()

    def embed(
        self,
        image: Input,
        text: Input,
        *,
        micro_batch_size: int | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> Embeddings:
        """Returns the embeddings of B pairs, see `embed_in_micro_batches`."""
        if self.tower.module.training:
            # A trainer that owns the module may have called train() on all it has.
            self.tower.module.eval()
        return embed_in_micro_batches(
            self.tower,
            image,
            text,
            micro_batch_size=micro_batch_size,
            autocast_dtype=autocast_dtype,
        )

    def __repr__(self) -> str:
        return f"<ReferenceModel {type(self.tower.module).__name__} on {self.tower.device}>"


def _check_independent(reference: nn.Module, learner: nn.Module) -> None:
    """Raises if training `learner` would change `reference`."""
    trained = {id(parameter) for parameter in learner.parameters()}
    for name, parameter in reference.named_parameters():
        if id(parameter) in trained:
            raise ConfigError(
                f"the reference shares {name} with the learner, so training would move it and "
                f"eval mode would reach the learner. Pass copy.deepcopy(reference)."
            )
