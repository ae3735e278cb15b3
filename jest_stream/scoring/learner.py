"""Keeps the learner copy: weights that score, a known number of steps behind those that train.

The module being trained goes in; the copy embeds super-batches and is refreshed by step count,
never by the clock. Copying is enqueued by the thread that calls `refresh`, on its current stream:
call it from the training thread between two optimizer steps, and no copy mixes the weights of two
steps. The learner itself is only read. `embed_once` runs the learner's weights themselves, to count
its FLOPs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from jest_stream.config import ScoringConfig
from jest_stream.errors import ConfigError, ResumeMismatchError
from jest_stream.scoring.score_size import FrozenModel, ScoreSize, fit, named_tensors, overwrite
from jest_stream.scoring.two_tower import Input, TwoTower, embed_in_micro_batches, two_tower
from jest_stream.types import Embeddings

_VERSION = 1


class LearnerCopy(FrozenModel):
    """A frozen copy of the learner, in eval mode, with its buffers, scale and bias.

    Forward hooks are part of a module's computation: the copy has them too, and they see scoring
    passes. Moving or converting the learner later is fine; a learner that gains, loses
    or resizes parameters is refused at the next refresh.

    Attributes:
      step: the step whose weights it holds; `embed` embeds under these.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        refresh_every: int,
        device: torch.device | str | None = None,
        step: int = 0,
        has_spare: bool = False,
        scoring: ScoringConfig | None = None,
    ) -> None:
        """Copies the weights that `learner` has now.

        Args:
          learner: the module being trained, wrapped or not. Not modified.
          refresh_every: steps between refreshes; 1 keeps the copy equal at every step.
          device: where the copy lives. None: where the learner is.
          step: the step that the present weights belong to.
          has_spare: hold two sets of weights in turn. A refresh writes to the one that is not
            embedded with: a device that does both at once need not wait.
          scoring: the sizes that the copy takes; its weights are resampled from the learner's at
            every refresh. None: the learner's sizes.

        Raises:
          ConfigError: if the learner is no two-tower module, cannot be copied, or cannot score at
            these sizes.
        """
        if refresh_every < 1:
            raise ConfigError(f"refresh_every must be at least 1 step, got {refresh_every}")
        self._learner = two_tower(learner).module
        self._refresh_every = refresh_every
        scoring = scoring or ScoringConfig()
        super().__init__(*self._made(device, scoring))
        # With a spare, a refresh writes to it and swaps the two. Without one, `_spare` is the tower
        # in use: the refresh overwrites that, and the swap changes nothing.
        self._spare = self._made(device, scoring)[0] if has_spare else self.tower
        self._shapes = {name: tensor.shape for name, tensor in named_tensors(self._learner).items()}
        self.step = step

    def _made(
        self, device: torch.device | str | None, scoring: ScoringConfig
    ) -> tuple[TwoTower, ScoreSize]:
        """Returns a copy that holds the present weights, at the sizes of the setting."""
        frozen = _copied(self._learner, device)
        size = fit(frozen, scoring, role="learner")
        if size.maps:  # `fit` has left the resampled tensors empty
            overwrite(named_tensors(frozen), named_tensors(self._learner), size)
        # Now, because modules that `fit` put in are in train mode.
        return two_tower(frozen.eval().requires_grad_(False)), size

    @property
    def written_next(self) -> int:
        """Names the set of weights that the next refresh writes to."""
        return id(self._spare)

    @property
    def read_now(self) -> int:
        """Names the set of weights that `embed` uses; the same one without a spare."""
        return id(self.tower)

    @property
    def home(self) -> torch.device:
        """Tells where the learner is now."""
        return two_tower(self._learner).device

    def is_due(self, step: int) -> bool:
        """Returns whether `refresh` would copy at this step."""
        # Refreshed every 10, a copy of step 7 is due at 10: 10 // 10 > 7 // 10. If the next call
        # comes only at step 12, it is due there.
        return step // self._refresh_every > self.step // self._refresh_every

    def refresh(self, step: int, *, force: bool = False) -> bool:
        """Copies the learner's weights if they are due; returns whether it did.

        Args:
          step: sub-batches handed out so far, which names the learner's present weights. Due
            at every multiple of `refresh_every`, or at the first call after one.
          force: copy them anyway.

        Raises:
          ConfigError: if the learner's parameters or buffers have other names or shapes than
            when the copy was made. The copy stays as it was.
        """
        if not (force or self.is_due(step)):
            return False
        # The learner may have been wrapped or moved since, which changes nothing here; layers that
        # were added or resized (a new head, LoRA) have no counterpart in the copy.
        source = named_tensors(self._learner)
        if difference := _difference(expected=self._shapes, found=source):
            raise ConfigError(
                f"the learner is not the module that was copied for scoring: {difference}. The "
                f"copy is made at the first batch, so change the learner's layers before it, or "
                f"make a new dataset after it."
            )
        overwrite(named_tensors(self._spare.module), source, self._size)
        self.tower, self._spare = self._spare, self.tower
        self.step = step
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the step and the weights, on the CPU and independent of the copy."""
        tensors = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in named_tensors(self.tower.module).items()
        }
        return {"version": _VERSION, "step": self.step, "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back a state that `state_dict` returned.

        Raises:
          ResumeMismatchError: if the state is of another module or version.
        """
        if state["version"] != _VERSION:
            raise ResumeMismatchError(
                f"the learner copy in the checkpoint has version {state['version']}, this release "
                f"reads version {_VERSION}. Resume with the release that wrote it, or without "
                f"the learner copy."
            )
        target = named_tensors(self.tower.module)
        shapes = {name: tensor.shape for name, tensor in target.items()}
        if difference := _difference(expected=shapes, found=state["tensors"]):
            raise ResumeMismatchError(
                f"the learner copy in the checkpoint is of another module than the learner, or "
                f"scores at another size: {difference}. Pass the learner and the image_size and "
                f"patch_size of scoring that the checkpoint was taken with."
            )
        # The saved tensors have the sizes of the copy: nothing is resampled.
        overwrite(target, state["tensors"], ScoreSize(role="learner"))
        self.step = state["step"]

    def __repr__(self) -> str:
        return (
            f"<LearnerCopy of {type(self._learner).__name__}, weights of step {self.step}, "
            f"refreshed every {self._refresh_every} on {self.tower.device}>"
        )


def embed_once(learner: nn.Module, image: Input, text: Input) -> Embeddings:
    """Returns the learner's embeddings of B pairs, in eval mode and without gradients.

    A stand-in with the same weights and copied buffers runs, so the learner's mode, buffers and
    gradients stay, and no weight is copied. Forward hooks run too: they are part of a module's
    computation.

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
            known[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    # `known` is the memo of deepcopy, which takes its parameters for copied already. Buffers are
    # copied: some modules write to theirs in eval mode too.
    with torch.inference_mode(False), torch.no_grad():
        return copy.deepcopy(module, known).eval()


def _copied(learner: nn.Module, device: torch.device | str | None) -> nn.Module:
    """Returns a copy of `learner` on `device`; raises `ConfigError` if that cannot be made."""
    for name, tensor in named_tensors(learner).items():
        if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise ConfigError(
                f"{name} of the learner has no values yet (a lazy module before its first "
                f"forward, or the meta device), so it cannot score yet. Run one "
                f"forward pass, or load the weights, before the first batch."
            )
        if hasattr(tensor, "full_tensor"):
            raise ConfigError(
                f"{name} of the learner is sharded (fully_shard), and a sharded learner cannot be "
                f"copied for scoring. Use DistributedDataParallel, or score with a small proxy "
                f"model that each rank holds in full."
            )
    try:
        # Tensors made under inference_mode would refuse every later refresh.
        with torch.inference_mode(False), torch.no_grad():
            return copy.deepcopy(learner).to(device=device).requires_grad_(False)
    except Exception as error:  # deepcopy runs code of every object that the module holds
        raise ConfigError(
            f"the learner, a {type(learner).__name__}, cannot be copied for scoring: {error}. "
            f"Often a module has kept a tensor of its last forward (detach it, or clear it before "
            f"the first batch), uses the old torch.nn.utils.weight_norm (use "
            f"torch.nn.utils.parametrizations), or has hooks that hold files or locks."
        ) from error


def _difference(*, expected: dict[str, torch.Size], found: dict[str, Tensor]) -> str:
    """Returns in words how `found` differs in names or shapes; empty if it does not.

    For example, "it lacks visual.proj, visual.ln.weight; logit_scale was [], is [1]".
    """
    parts = []
    for label, names in (
        ("it lacks", [name for name in expected if name not in found]),
        ("it has also", [name for name in found if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{label} {', '.join(names[:3])}{more}")
    for name, shape in expected.items():
        if name in found and found[name].shape != shape:
            parts.append(f"{name} was {list(shape)}, is {list(found[name].shape)}")
            break  # one is enough: a changed width changes every layer
    return "; ".join(parts)
