"""Runs the model being trained at the size that its copy scores at: `at_score_size`.

For training at two sizes with one set of weights. Nothing is copied: the returned model, a shell,
holds the learner's own modules, parameters and buffers; only the few modules around its patch and
position embeddings are others, and resample these from the learner's at every use.
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
    """Returns `model` as it scores under `scoring`, with the same weights, to be trained too.

    It has the methods of `model` and is called likewise, with images of the score size. Gradients
    reach the parameters of `model`, which are its own parameters: pass `model.parameters()` to the
    optimizer, once. Later changes of `model` (a step, `load_state_dict`, `to`, `train`) hold for
    both. A model that takes smaller images by itself is returned as it is.

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
    own = {name: tensor for name, tensor in shell.named_buffers() if plain(name) in size.own}
    holders = {name.rpartition(".")[0] for name in (*size.maps, *own)}
    changed = _with_parents(holders | size.modules, shell, inner)
    _share(shell, inner, "", size.maps, own, changed)
    return shell  # type: ignore[return-value]


def _with_parents(changed: set[str], shell: nn.Module, model: nn.Module) -> set[str]:
    """Returns the names of all modules that must not be the model's own, parents included."""
    theirs = dict(model.named_modules())
    names = set(changed)
    for name, module in shell.named_modules():
        if name not in theirs or type(module) is not type(theirs[name]):
            names.add(name)  # the layer that drops tokens
    for name in list(names):  # "visual.conv1" adds "", the model itself, and "visual"
        parts = name.split(".")
        names.update(".".join(parts[:depth]) for depth in range(len(parts)))
    compiled = [name for name in names if hasattr(theirs.get(name), "_orig_mod")]
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
    own: Mapping[str, Tensor],
    changed: set[str],
) -> None:
    """Makes everything below `shell` the model's own, but for the changed modules.

    There are three cases for a child: changed in both, it is entered; else the model's takes its
    place; one that only the shell has (the layer that drops tokens) stays.
    """
    for name, child in list(shell._modules.items()):
        full = f"{path}.{name}".strip(".")
        theirs = model._modules.get(name)
        if child is not None and theirs is not None and full in changed:
            _share(child, theirs, full, maps, own, changed)
        elif theirs is not None:
            shell._modules[name] = theirs
    if type(shell) is not type(model):  # the layer that drops tokens; it has no weights
        return
    prefix = f"{path}." if path else ""
    made: dict[str, Resampling | _Own] = {}
    for name in (*shell._parameters, *shell._buffers):
        if (full := prefix + name) in maps:
            made[name] = maps[full]
        elif full in own:
            made[name] = _Own(own[full])
    # The dicts themselves: .to() and load_state_dict(assign=True) replace the tensors in them.
    shell._parameters, shell._buffers = model._parameters, model._buffers
    shell.__dict__["_full_size"], shell.__dict__["_made"] = model, made
    # A subclass with properties: `self.weight` in a forward pass finds these before the dicts.
    shell.__class__ = _live_class(type(shell), tuple(made))


class _Own:
    """A buffer that depends on the size, on the device of the model's."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __call__(self, theirs: Tensor) -> Tensor:
        if self._tensor.device != theirs.device:
            self._tensor = self._tensor.to(theirs.device)
        return self._tensor


def _live_class(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Returns a class whose tensors of these names are made from the full-size module's."""

    def _made(name: str) -> property:
        return property(lambda self: self._made[name](getattr(self._full_size, name)))

    def _train(self: Any, mode: bool) -> None:
        self._full_size.training = mode

    members: dict[str, Any] = {name: _made(name) for name in names}
    members["training"] = property(lambda self: self._full_size.training, _train)
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__})
