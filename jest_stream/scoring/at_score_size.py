"""Runs the model being trained at the size that its copy scores at: `at_score_size`.

It serves training at two sizes with one set of weights. No weight is copied: the returned model, a
shell, holds the learner's modules, parameters and buffers. Only the few modules around its patch
and position embeddings are new ones, which resample the learner's weights at every use.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from jest_stream.config import ScoringConfig
from jest_stream.errors import ConfigError
from jest_stream.scoring.resampling import Resampling
from jest_stream.scoring.score_size import fit, plain
from jest_stream.scoring.two_tower import unwrap

_Model = TypeVar("_Model", bound=nn.Module)


def at_score_size(model: _Model, scoring: ScoringConfig) -> _Model:
    """Returns a model with the weights of `model` that takes images of the score size.

    It has the methods of `model` and is called likewise. Both share their parameters, so gradients
    reach those of `model`: pass `model.parameters()` to the optimizer, once. Later changes of
    `model` (a step, `load_state_dict`, `to`, `train`) hold for both. A model that takes smaller
    images by itself is returned as it is.

    With `DistributedDataParallel`, call the wrapped learner with the large images and go back once,
    through the sum of both losses. The model returned here knows no ranks: a backward pass through
    its loss alone leaves each rank with other gradients, and no error says so.

    Args:
      model: the learner. Not modified. Layers that were compiled one by one are refused; compile
        the whole afterwards.
      scoring: the same as the dataset's.

    Raises:
      ConfigError: if the model cannot score like this.
    """
    inner = unwrap(model)
    for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
        if hasattr(tensor, "full_tensor"):
            raise ConfigError(
                f"{name} of the learner is sharded (fully_shard), so its position embeddings "
                f"cannot be resampled. Use DistributedDataParallel, or a model that takes smaller "
                f"images by itself."
            )
    with torch.inference_mode(False), torch.no_grad():
        shell = copy.deepcopy(inner)
        size = fit(shell, scoring, role="learner")
    if not size.is_changed:
        return model
    buffers = {
        name: tensor for name, tensor in shell.named_buffers() if plain(name) in size.not_copied
    }
    holders = {name.rpartition(".")[0] for name in (*size.maps, *buffers)}
    changed = _with_parents(holders | size.modules, shell, inner)
    _share(shell, inner, "", size.maps, buffers, changed)
    return shell  # type: ignore[return-value]


def _with_parents(changed: set[str], shell: nn.Module, model: nn.Module) -> set[str]:
    """Returns the names of all modules that shell and model cannot share, parents included."""
    of_model = dict(model.named_modules())
    names = set(changed)
    for name, module in shell.named_modules():
        if name not in of_model or type(module) is not type(of_model[name]):
            names.add(name)  # the layer that drops tokens
    for name in list(names):  # "visual.conv1" adds "", the model itself, and "visual"
        parts = name.split(".")
        names.update(".".join(parts[:depth]) for depth in range(len(parts)))
    # A compiled layer calls the code that was compiled for the model's size, whatever it holds.
    compiled = [name for name in names if hasattr(of_model.get(name), "_orig_mod")]
    if compiled:
        raise ConfigError(
            f"{compiled[0] or 'the learner'} was compiled by itself, so it has one size. Call "
            f"at_score_size before compiling."
        )
    return names


def _share(
    shell: nn.Module,
    model: nn.Module,
    path: str,
    maps: Mapping[str, Resampling],
    buffers: Mapping[str, Tensor],
    changed: set[str],
) -> None:
    """Puts the model's modules and tensors into `shell`, but for the changed ones.

    Args:
      shell: the model at the score size, or a module of it; modified.
      model: the same module at full size.
      path: the name of both within the whole model.
      maps: by full name, how a tensor is made from the model's.
      buffers: by full name, those of the shell's buffers that depend on the size.
      changed: full names of the modules that cannot be shared.
    """
    for name, child in list(shell._modules.items()):
        full = f"{path}.{name}".strip(".")
        of_model = model._modules.get(name)
        # There are three cases:
        # 1. A child that cannot be shared as a whole is entered.
        if child is not None and of_model is not None and full in changed:
            _share(child, of_model, full, maps, buffers, changed)
        # 2. The model's child takes the place of the copy.
        elif of_model is not None:
            shell._modules[name] = of_model
        # 3. One that only the shell has (the layer that drops tokens) stays.
    if type(shell) is not type(model):  # the layer that drops tokens; it has no weights
        return
    prefix = f"{path}." if path else ""
    made: dict[str, Resampling | _SizeBuffer] = {}
    for name in (*shell._parameters, *shell._buffers):
        if (full := prefix + name) in maps:
            made[name] = maps[full]
        elif full in buffers:
            made[name] = _SizeBuffer(buffers[full])
    # The dicts themselves: .to() and load_state_dict(assign=True) replace the tensors in them.
    shell._parameters, shell._buffers = model._parameters, model._buffers
    shell.__dict__["_full_size"], shell.__dict__["_made"] = model, made
    # A subclass with properties: a forward pass that reads `self.weight` finds the property, since
    # properties of a class come before `nn.Module.__getattr__`, which would look into the dicts.
    shell.__class__ = _live_class(type(shell), tuple(made))


class _SizeBuffer:
    """A buffer of the score size, kept on the device of the model's buffer of that name."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __call__(self, of_model: Tensor) -> Tensor:
        if self._tensor.device != of_model.device:
            self._tensor = self._tensor.to(of_model.device)
        return self._tensor


def _live_class(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Returns a subclass of `kind` that makes the named tensors from the full-size ones."""

    def _made(name: str) -> property:
        return property(lambda self: self._made[name](getattr(self._full_size, name)))

    def _train(self: Any, mode: bool) -> None:
        self._full_size.training = mode

    members: dict[str, Any] = {name: _made(name) for name in names}
    members["training"] = property(lambda self: self._full_size.training, _train)
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__})
