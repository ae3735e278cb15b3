"""Embeds with two-tower models of any library: images and texts go in, `Embeddings` come out.

`two_tower(module)` looks through wrappers and finds the methods; `embed_in_micro_batches` scores a
super-batch. Nothing here imports open_clip or transformers: a model is known by its methods.
Everything runs in the thread that calls it and is enqueued on its current stream; no value is read
back from the device.

Shapes: B: rows given, D: embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jest_stream.errors import ConfigError
from jest_stream.types import Embeddings


@dataclass(frozen=True)
class Pixels:
    """Stored images, and a function that turns some of them into the tower's input."""

    rows: Tensor
    finish: Callable[[Tensor], Tensor]
    """Called with a few rows, on the device of the tower."""
    image_size: tuple[int, ...]
    """Height and width of the finished images."""

    @property
    def shaped(self) -> Tensor:
        """All finished images, without values."""
        return torch.empty((*self.rows.shape[:2], *self.image_size), device="meta")


Input = Tensor | Mapping[str, Tensor] | Pixels
"""Images or texts to embed: a tensor, or named tensors that the tower takes as keywords, or pixels.
All have B rows."""

# Preferred first: some models on the hub have transformers' methods for tensors beside an
# `encode_image` that takes files or PIL images.
_METHODS = (("get_image_features", "get_text_features"), ("encode_image", "encode_text"))

_ACCEPTED = (
    "Accepted are open_clip models, transformers models with get_image_features and "
    "get_text_features (CLIP, SigLIP), and any module with encode_image(image), encode_text(text) "
    "and logit_scale, the log of the multiplier, as a parameter or buffer (logit_bias likewise, "
    "if there is one)"
)


@dataclass(frozen=True)
class TwoTower:
    """A two-tower module, ready to embed. Made by `two_tower`."""

    module: nn.Module
    """The module itself, without wrappers."""
    image_method: str
    """Name of the method that embeds images; the next one's embeds texts."""
    text_method: str
    role: str
    """The module's name in messages: learner or reference."""

    @property
    def has_bias(self) -> bool:
        """Tells whether the module has a logit bias, as those made for the sigmoid loss do."""
        return getattr(self.module, "logit_bias", None) is not None

    @property
    def device(self) -> torch.device:
        """The device of the module's logit scale, and so of the module."""
        return _scalar(self.module, "logit_scale", self.role).device

    @property
    def scale_and_bias(self) -> tuple[Tensor, Tensor | float]:
        """The multiplier of the logits, exponentiated, and their offset: new tensors."""
        scale = _scalar(self.module, "logit_scale", self.role).float().exp().reshape(())
        bias: Tensor | float = 0.0
        if self.has_bias:
            # Cloned, since the learner copy is refreshed in place while embeddings are still in
            # use. The scale needs no clone: exp makes a new tensor.
            bias = _scalar(self.module, "logit_bias", self.role).float().clone().reshape(())
        return scale, bias

    def embed(self, image: Input, text: Input) -> Embeddings:
        """Returns the embeddings of B pairs, in float32 and with unit-norm rows.

        Runs the module as it stands: its mode, the caller's gradients and autocast apply.
        Floating inputs are cast to the precision of the module's weights unless autocast does
        so. Scale and bias are new 0-d tensors, which do not change with the module.

        Args:
          image: `[B, ...]`, or named tensors that the image tower takes as keywords.
          text: `[B, ...]` tokens, or named tensors likewise.
        """
        image_rows = self._rows(self.image_method, image)
        text_rows = self._rows(self.text_method, text)
        if image_rows.shape != text_rows.shape:
            raise ConfigError(
                f"the {self.role} gave image embeddings of shape {list(image_rows.shape)} and text "
                f"embeddings of shape {list(text_rows.shape)}. Both towers must give one row per "
                f"pair and the same dimension."
            )
        scale, bias = self.scale_and_bias
        return Embeddings(image=image_rows, text=text_rows, logit_scale=scale, logit_bias=bias)

    def _rows(self, method: str, value: Input) -> Tensor:
        """Returns `[B, D]` unit-norm float32 rows of one tower."""
        if isinstance(value, Pixels):
            value = value.finish(value.rows)
        encode = getattr(self.module, method)
        dtype = _weight_dtype(self.module)
        if isinstance(value, Mapping):
            output = encode(**{name: _cast(tensor, dtype) for name, tensor in value.items()})
        else:
            output = encode(_cast(value, dtype))
        # Current transformers return an output object, whose pooler_output is the embedding.
        rows = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
        if not isinstance(rows, Tensor) or rows.ndim != 2:
            found = f"shape {list(rows.shape)}" if isinstance(rows, Tensor) else type(output)
            raise ConfigError(
                f"{method} of the {self.role} returned {found}; needed is one embedding per row: "
                f"a tensor of shape [B, D], or an output object with such a pooler_output."
            )
        return F.normalize(rows.float(), dim=-1)


def two_tower(module: nn.Module, *, role: str = "learner") -> TwoTower:
    """Returns `module` as a `TwoTower`, looking through wrappers.

    Args:
      module: an open_clip or transformers model, or any module with `encode_image`,
        `encode_text` and `logit_scale` (the log, as in both libraries). Not modified.
      role: its name in messages.

    Raises:
      ConfigError: if a method or the logit scale is missing.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{role} must be a torch.nn.Module, got {type(module)}. {_ACCEPTED}.")
    inner = unwrap(module)
    for image_method, text_method in _METHODS:
        if _has(inner, image_method) and _has(inner, text_method):
            break
    else:  # no style is complete
        # The message names the style that the module has half of; the plain one if neither.
        style = next((pair for pair in _METHODS if any(_has(inner, m) for m in pair)), _METHODS[1])
        missing = " and ".join(method for method in style if not _has(inner, method))
        raise ConfigError(
            f"the {role}, a {type(inner).__name__}, has no {missing}, so its pairs cannot be "
            f"scored. {_ACCEPTED}."
        )
    tower = TwoTower(inner, image_method, text_method, role)
    # Raised here rather than in the first scoring pass.
    _scalar(inner, "logit_scale", role)
    if tower.has_bias:
        _scalar(inner, "logit_bias", role)
    return tower


def has_bias(module: nn.Module) -> bool:
    """Returns whether `module` was made for the sigmoid loss, for `loss="auto"`."""
    return two_tower(module).has_bias


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the module inside `DistributedDataParallel`, `torch.compile` and the like.

    A module whose own class has the tower methods is never looked through: its work around an
    inner `module` is part of the model.
    """
    while True:  # wrappers nest: compiled inside data parallel, and the reverse
        inner = getattr(module, "_orig_mod", None)  # torch.compile
        if inner is None and not any(hasattr(type(module), pair[0]) for pair in _METHODS):
            inner = getattr(module, "module", None)  # data parallel, averaged models
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def embed_in_micro_batches(
    tower: TwoTower,
    image: Input,
    text: Input,
    *,
    micro_batch_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Embeddings:
    """Returns the embeddings of B pairs, computed a few rows at a time and without gradients.

    The caller's gradient mode and autocast are as before afterwards. The results are ordinary
    tensors (`no_grad`, not `inference_mode`), which may take part in autograd.

    Args:
      tower: the model; its mode (train or eval) is left as it is.
      image: `[B, ...]`, or named tensors of B rows each.
      text: as `image`.
      micro_batch_size: rows per pass, the last pass may have fewer. None takes all at once.
      autocast_dtype: run under autocast in this precision; None runs in the weights' own, even
        inside an autocast of the caller.
      device: where the model is; rows on another device are moved pass by pass. None: the
        model's.
    """
    num_rows = _num_rows(image, "image", tower.role)
    if num_rows != _num_rows(text, "text", tower.role):
        raise ConfigError(
            f"the {tower.role} was given {num_rows} images and "
            f"{_num_rows(text, 'text', tower.role)} texts; each image needs one text."
        )
    device = device or tower.device
    size = micro_batch_size or num_rows
    # inference_mode(False): a dataset iterated under inference_mode must not make tensors that
    # later steps cannot use. autocast with enabled=False ends an autocast of the caller.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
    ):
        parts = [
            tower.embed(
                _slice(image, start, start + size, device),
                _slice(text, start, start + size, device),
            )
            for start in range(0, num_rows, size)
        ]
        return Embeddings(
            image=torch.cat([part.image for part in parts]),
            text=torch.cat([part.text for part in parts]),
            logit_scale=parts[0].logit_scale,
            logit_bias=parts[0].logit_bias,
        )


def _has(module: nn.Module, method: str) -> bool:
    return callable(getattr(module, method, None))


def _scalar(module: nn.Module, name: str, role: str) -> Tensor:
    """Returns `logit_scale` or `logit_bias`, a tensor of one element."""
    value = getattr(module, name, None)
    # A plain attribute would be missed by `.to()` and by the refresh of the learner copy.
    if not isinstance(value, Tensor) or name in vars(module):
        found = "no" if value is None else f"{type(value)} as its"
        raise ConfigError(
            f"the {role}, a {type(module).__name__}, has {found} {name}; it must be a parameter or "
            f"buffer of one element, to move and be copied with the module: use "
            f"torch.nn.Parameter or register_buffer. {_ACCEPTED}."
        )
    if value.numel() != 1:
        raise ConfigError(
            f"{name} of the {role} has shape {list(value.shape)}; needed is one number."
        )
    return value


def _weight_dtype(module: nn.Module) -> torch.dtype | None:
    """Returns the precision that inputs must have; None leaves them alone.

    The first layer that multiplies decides.
    """
    # Not the first parameter: models stored in half precision often keep norms, position embeddings
    # and the logit scale in float32.
    for layer in module.modules():
        # Quantised layers hold integers, which say nothing of the inputs' precision.
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.is_floating_point():
            return layer.weight.dtype
    return None


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    # Integers are tokens, which an embedding layer takes as they are.
    is_autocast = torch.is_autocast_enabled(value.device.type)
    if dtype is None or is_autocast or not value.is_floating_point():
        return value
    return value.to(dtype)


def _num_rows(value: Input, kind: str, role: str) -> int:
    """Returns B, the first size of every tensor in `value`."""
    if isinstance(value, Pixels):
        value = value.rows
    tensors = dict(value) if isinstance(value, Mapping) else {kind: value}
    sizes = {
        name: len(tensor) if isinstance(tensor, Tensor) and tensor.ndim else None
        for name, tensor in tensors.items()
    }
    rows = next(iter(sizes.values()), None)
    if not rows or any(size != rows for size in sizes.values()):
        raise ConfigError(
            f"the {kind} input of the {role} must be a tensor or a mapping of tensors with one "
            f"row per example, got rows {sizes}."
        )
    return rows


def _slice(value: Input, start: int, stop: int, device: torch.device) -> Input:
    """Returns rows `start` to `stop`, on `device`. From pinned memory the copy does not wait."""
    if isinstance(value, Pixels):
        rows = _slice(value.rows, start, stop, device)
        assert isinstance(rows, Tensor)
        return value.finish(rows)
    is_asynchronous = device.type != "cpu"  # towards the CPU it would be read before it arrives
    if isinstance(value, Mapping):
        return {
            name: tensor[start:stop].to(device, non_blocking=is_asynchronous)
            for name, tensor in value.items()
        }
    return value[start:stop].to(device, non_blocking=is_asynchronous)
