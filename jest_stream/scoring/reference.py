"""Keeps the reference model: a frozen two-tower module that says which pairs can be learned.

Its dimension, resolution and tokenizer may differ from the learner's, since only losses of pairs
are compared. It runs in the thread that calls it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from jest_stream.config import ScoringConfig
from jest_stream.errors import ConfigError
from jest_stream.scoring.score_size import FrozenModel, ScoreSize, fit, named_tensors, overwrite
from jest_stream.scoring.two_tower import two_tower


class ReferenceModel(FrozenModel):
    """The user's reference, moved to the scoring device and kept in eval mode.

    It runs without gradients, so its `requires_grad` is left alone. Where it scores at another size
    than it was made for, a resized copy does the work, and the module stays as and where it was.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        device: torch.device | str | None = None,
        learner: nn.Module | None = None,
        scoring: ScoringConfig | None = None,
    ) -> None:
        """Moves `module` and puts it into eval mode.

        Args:
          module: any two-tower module, see `two_tower`.
          device: where it runs from now on. None: where it is.
          learner: the module being trained, which must not share parameters with `module`.
          scoring: the sizes that it scores at. None: those that it was made for.

        Raises:
          ConfigError: if it is no two-tower module, shares parameters with the learner, or cannot
            score at these sizes.
        """
        module = two_tower(module, role="reference").module
        if learner is not None:
            _check_independent(module, learner)
        module, size = _fitted(module, scoring or ScoringConfig())
        super().__init__(two_tower(module, role="reference"), size)
        module.to(device=device).eval()

    @property
    def scale_and_bias(self) -> tuple[Tensor, Tensor | float]:
        """The multiplier of the reference's logits, and their offset."""
        return self.tower.scale_and_bias

    def __repr__(self) -> str:
        return f"<ReferenceModel {type(self.tower.module).__name__} on {self.tower.device}>"


def _fitted(module: nn.Module, scoring: ScoringConfig) -> tuple[nn.Module, ScoreSize]:
    """Returns the module that scores, a copy if it is resized, and its sizes."""
    # Without a size to change, `fit` only looks: no copy is made of a model that may be large.
    if scoring.image_size is None and not scoring.changes_tokens:
        return module, fit(module, scoring, role="reference")
    with torch.inference_mode(False), torch.no_grad():
        resized = copy.deepcopy(module)
        size = fit(resized, scoring, role="reference")
        if not size.is_changed:
            return module, size
        overwrite(named_tensors(resized), named_tensors(module), size)
    return resized, size


def _check_independent(reference: nn.Module, learner: nn.Module) -> None:
    """Raises if training `learner` would change `reference`."""
    trained = {id(parameter) for parameter in learner.parameters()}
    for name, parameter in reference.named_parameters():
        if id(parameter) in trained:
            raise ConfigError(
                f"the reference shares {name} with the learner, so training would move it and "
                f"eval mode would reach the learner. Pass copy.deepcopy(reference)."
            )
