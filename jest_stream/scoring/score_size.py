"""Fits a model to score with fewer image tokens, as a `ScoringConfig` says.

`fit` changes a copy of a model and returns a `ScoreSize`, which tells how the copy's weights are
made from the model's; the learner copy, the live reference and `at_score_size` use it.
`FrozenModel` is the common part of learner copy and reference. A model without a known vision
transformer is left as it is: it may take smaller images by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from jest_stream.config import ScoringConfig
from jest_stream.errors import ConfigError
from jest_stream.scoring.image_towers import Tower, known_towers
from jest_stream.scoring.resampling import PatchMap, PositionMap, Resampling, Size
from jest_stream.scoring.two_tower import Input, Pixels, TwoTower, embed_in_micro_batches
from jest_stream.types import Embeddings

_KNOWN = (
    "Known are the vision transformers of open_clip and timm (VisionTransformer, Eva) and CLIP's "
    "and SigLIP's of transformers"
)


@dataclass(kw_only=True)
class ScoreSize:
    """The size of the images that one model scores, and the maps that make its weights."""

    role: str
    """The model's name in messages: learner or reference."""
    wanted: int | None = None
    """The image size that the user set."""
    takes: Size | None = None
    """The image size that the model was changed for; None if it was not changed."""
    own_size: Size | None = None
    """The image size that a known tower was made for."""
    declared: object = None
    """The image size that an unknown model says it takes."""
    maps: Mapping[str, Resampling] = field(default_factory=dict)
    """The tensors that are resampled, by name."""
    not_copied: frozenset[str] = frozenset()
    """The tensors that follow from the size, such as position ids, by name: never overwritten."""
    modules: frozenset[str] = frozenset()
    """The modules that know the size, by name, beside those that hold such tensors."""
    has_worked: bool = False
    """Whether a forward pass has succeeded."""

    @property
    def is_changed(self) -> bool:
        """Tells whether the model is another than it was before `fit`."""
        return self.takes is not None

    @contextmanager
    def checked(self, image: Input) -> Iterator[None]:
        """Raises `ConfigError` for images that the model cannot take; around a forward pass."""
        # There are two kinds of models:
        # 1. The size of a changed tower is known, and compared before.
        size = image_size_of(image)
        if self.takes is not None and size is not None and size != self.takes:
            raise ConfigError(self._mismatch(size, self.takes))
        # 2. Others show a wrong size by failing, with the errors below. Only an error of the first
        #    pass is explained by the size: once a pass has worked, the size is right.
        try:
            yield
        except (RuntimeError, ValueError, AssertionError) as error:
            is_other = isinstance(error, ConfigError | torch.OutOfMemoryError)
            if is_other or self.has_worked or size is None or not self._blames(size):
                raise
            if self.own_size is not None:
                raise ConfigError(self._mismatch(size, self.own_size)) from error
            made_for = f" (it was made for {_text(self.declared)})" if self.declared else ""
            raise ConfigError(
                f"the {self.role} could not embed images of {_text(size)}{made_for}: "
                f"{str(error).rstrip('.')}. "
                f"{_KNOWN}; these are resized. Any other model must take the size of the score "
                f"view by itself. Let transform give the size that it takes, and leave "
                f"scoring.image_size at None."
            ) from error
        self.has_worked = True

    def _blames(self, size: Size) -> bool:
        """Returns whether images of this size are a likely cause of a failure."""
        if self.own_size is not None:  # a known tower, left as it was
            return self.takes is None and size != self.own_size
        # An unknown model: the user set a size, or the model declares another, as a pair or a side.
        return self.wanted is not None or self.declared not in (None, size, size[0])

    def _mismatch(self, size: Size, takes: Size) -> str:
        # image_size of scoring is one number: it can only help where both sizes are square.
        if self.wanted is not None or takes[0] != takes[1] or size[0] != size[1]:
            fix = "Let transform give images of the size that is scored"
        elif size[0] < takes[0]:
            fix = (
                f"Pass scoring=ScoringConfig(image_size={size[0]}) to score the smaller view, with "
                f"position embeddings resampled in the copy"
            )
        else:
            fix = (
                f"Pass scoring=ScoringConfig(image_size={takes[0]}) to scale the score view down, "
                f"or let transform do it"
            )
        return (
            f"the {self.role} takes images of {_text(takes)}, but the score view that transform "
            f"gives is {_text(size)}. {fix}."
        )


class FrozenModel:
    """A two-tower module in eval mode that embeds candidates at the size it was fitted to.

    Attributes:
      tower: the module, as a `TwoTower`.
    """

    def __init__(self, tower: TwoTower, size: ScoreSize) -> None:
        self.tower = tower
        self._size = size

    def embed(
        self,
        image: Input,
        text: Input,
        *,
        micro_batch_size: int | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> Embeddings:
        """Returns the embeddings of B pairs, see `embed_in_micro_batches`.

        Raises:
          ConfigError: for images of a size that the module does not take.
        """
        if self.tower.module.training:
            # A trainer that owns the reference may have called train() on all it has.
            self.tower.module.eval()
        with self._size.checked(image):
            return embed_in_micro_batches(
                self.tower,
                image,
                text,
                micro_batch_size=micro_batch_size,
                autocast_dtype=autocast_dtype,
            )


def image_size_of(image: Input) -> Size | None:
    """Returns height and width of a batch of images; None if it holds no pixels."""
    if isinstance(image, Pixels):
        return image.image_size[0], image.image_size[1]
    tensors = image.values() if isinstance(image, Mapping) else [image]
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.ndim == 4:
            return tensor.shape[2], tensor.shape[3]
    return None


def fit(model: nn.Module, scoring: ScoringConfig, *, role: str) -> ScoreSize:
    """Changes `model`, a copy, to score as the setting says; returns how its weights are made.

    Resampled tensors are left empty; see `overwrite`.

    Raises:
      ConfigError: if the model cannot score like this, with the reason.
    """
    tower = _tower_of(model, scoring, role)
    if tower is None:
        declared = getattr(getattr(model, "visual", model), "image_size", None)
        return ScoreSize(role=role, wanted=scoring.image_size, declared=declared)
    own_size = tower.image_size
    image_size, patch_size = _checked_sizes(tower, scoring, role)
    is_resized = (image_size, patch_size) != (tower.image_size, tower.patch_size)
    is_changed = is_resized or scoring.token_fraction < 1
    if is_changed and tower.obstacle:
        raise ConfigError(
            f"the {role}'s image tower, a {type(tower.module).__name__}, {tower.obstacle}, so it "
            f"cannot score with fewer tokens. Leave image_size, patch_size and token_fraction of "
            f"scoring at their defaults."
        )
    maps: dict[str, Resampling] = {}
    not_copied: frozenset[str] = frozenset()
    if is_resized:
        maps = _maps(tower, image_size, patch_size)
        # Tensors without a map whose shape follows the size, such as position ids and rotary
        # angles, are the resized tower's: copying the model's over them would break it.
        before = {name: tensor.shape for name, tensor in named_tensors(model).items()}
        tower.resize(image_size, patch_size)
        after = named_tensors(model)
        not_copied = frozenset(
            name for name in after if name not in maps and after[name].shape != before.get(name)
        )
    if scoring.token_fraction < 1:
        tower.keep_tokens(scoring.token_fraction)
    return ScoreSize(
        role=role,
        wanted=scoring.image_size,
        takes=image_size if is_changed else None,
        own_size=own_size,
        maps=maps,
        not_copied=not_copied,
        modules=frozenset({tower.path, tower.full(tower.patches)}) if is_changed else frozenset(),
    )


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns every parameter and buffer once, tied ones under their first name.

    Layers that were compiled in place after the copy was made keep their names.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    return {plain(name): tensor for name, tensor in named}


def plain(name: str) -> str:
    """Returns a name without the prefix that `torch.compile` adds to it."""
    return name.replace("_orig_mod.", "")


def overwrite(target: Mapping[str, Tensor], source: Mapping[str, Tensor], size: ScoreSize) -> None:
    """Copies values over, resampled where the sizes differ; few kernels however many tensors.

    Works across devices and precisions. Nothing waits for the device.
    """
    same = [name for name in target if name not in size.maps and name not in size.not_copied]
    with torch.no_grad():
        torch._foreach_copy_([target[name] for name in same], [source[name] for name in same])
        for name, resample in size.maps.items():
            target[name].copy_(resample(source[name].to(target[name].device)))


def _tower_of(model: nn.Module, scoring: ScoringConfig, role: str) -> Tower | None:
    """Returns the image tower; None without a known one, if the setting needs none."""
    towers = list(known_towers(model))
    if len(towers) == 1:
        return towers[0]
    if towers and (scoring.image_size is not None or scoring.changes_tokens):
        paths = " and ".join(repr(tower.path) for tower in towers)
        raise ConfigError(
            f"the {role} has {len(towers)} vision transformers, {paths}, so it is not clear which "
            f"of them should score at another size. Leave image_size, patch_size and "
            f"token_fraction of scoring at their defaults."
        )
    if scoring.changes_tokens:
        name = "patch_size" if scoring.patch_size is not None else "token_fraction"
        visual = getattr(model, "visual", model)
        kind = type(getattr(visual, "trunk", visual))
        raise ConfigError(
            f"scoring.{name}={getattr(scoring, name)}, but the {role}'s image tower, a "
            f"{kind.__name__}, is no vision transformer that is known here: it is of "
            f"{kind.__module__}. {_KNOWN}. "
            f"Use scoring.image_size instead, if the model takes smaller images."
        )
    return None


def _checked_sizes(tower: Tower, scoring: ScoringConfig, role: str) -> tuple[Size, Size]:
    """Returns the image and patch size that are scored."""
    image_size, patch_size = tower.image_size, tower.patch_size
    wanted_image, wanted_patch = scoring.image_size, scoring.patch_size
    if wanted_image is None and wanted_patch is None:
        return image_size, patch_size
    if image_size[0] != image_size[1] or patch_size[0] != patch_size[1]:
        raise ConfigError(
            f"the {role}'s image tower takes images of {_text(image_size)} in patches of "
            f"{_text(patch_size)}; only square ones can be resized. Leave image_size and "
            f"patch_size of scoring at None."
        )
    image, patch = wanted_image or image_size[0], wanted_patch or patch_size[0]
    if patch < patch_size[0]:
        raise ConfigError(
            f"scoring.patch_size={patch} is below the {role}'s own, {patch_size[0]}, so scoring "
            f"would cost more than training. Pass a larger one, or None."
        )
    if (image, patch) != (image_size[0], patch_size[0]) and (patch > image or image % patch):
        # Of 100 pixels in patches of 16: the multiples next to it, 96 or 112.
        fitting = sorted({max(1, image // patch) * patch, (image // patch + 1) * patch})
        sizes = " or ".join(str(size) for size in fitting)
        raise ConfigError(
            f"the {role} would score images of {_text((image, image))} in patches of "
            f"{_text((patch, patch))}, which do not divide them. Pass "
            f"scoring=ScoringConfig(image_size={sizes}, ...)"
            + (", or a smaller patch_size." if wanted_patch is not None else ".")
        )
    return (image, image), (patch, patch)


def _maps(tower: Tower, image_size: Size, patch_size: Size) -> dict[str, Resampling]:
    # Either size, or both, may change:
    # 1. Another patch size changes the convolution.
    maps: dict[str, Resampling] = {}
    if patch_size != tower.patch_size:
        name = plain(tower.full(f"{tower.patches}.weight"))
        maps[name] = PatchMap(tower.patch_size, patch_size)
    # 2. Another grid changes the position embedding. 224 pixels in patches of 16 and 448 in patches
    #    of 32 make the same grid, 14 x 14.
    grid = image_size[0] // patch_size[0], image_size[1] // patch_size[1]
    if tower.positions and grid != tower.grid:
        maps[plain(tower.full(tower.positions))] = PositionMap(tower.grid, grid, tower.num_prefix)
    return maps


def _text(size: object) -> str:
    if isinstance(size, tuple):
        return " x ".join(str(side) for side in size) + " pixels"
    return f"{size} x {size} pixels"
