"""Loads references by name: open_clip's models, with their own transform and tokenizer.

In: `open_clip:NAME/TAG`, `open_clip:NAME` where open_clip knows one tag only,
`open_clip:NAME/PATH.safetensors`, or a folder in open_clip's own layout.
Weights from a path are safetensors, never anything that could hold code. open_clip is imported when
a name is asked for.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from jest_stream.errors import ConfigError, UnsafeDataError

_PREFIX = "open_clip:"
_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
_VIEW = ("mean", "std", "interpolation", "resize_mode")
_FORMS = (
    "Write open_clip:NAME/TAG for weights that open_clip knows, open_clip:NAME/PATH.safetensors "
    f"for your own, or the path of a folder with {_CONFIG} and {_WEIGHTS}."
)


@dataclass(frozen=True, kw_only=True)
class NamedReference:
    """A model, with the transform and tokenizer that it was trained with."""

    module: nn.Module
    transform: Any
    tokenizer: Any


def is_named(reference: object) -> bool:
    """Returns whether an address is a model's: `open_clip:...`, its folder, or a checkpoint."""
    if not isinstance(reference, str | os.PathLike):
        return False
    name = os.fspath(reference)
    is_checkpoint = Path(name).suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
    return name.startswith(_PREFIX) or is_checkpoint or (Path(name) / _CONFIG).is_file()


def load_reference(name: str | os.PathLike[str]) -> NamedReference:
    """Returns the model of a name, on the CPU and in eval mode, with its own views.

    Args:
      name: one of the forms above, in the module's docstring.

    Raises:
      ConfigError: for a name that means no model, or no weights.
      UnsafeDataError: for weights that are not safetensors.
    """
    # A name without prefix is a folder, or a mistake; after the prefix, the weights are
    # 1. a tag of open_clip's, which may be left out where it is the only one,
    # 2. a file of the user's, seen as the known weights of that model are.
    name = os.fspath(name)
    if not name.startswith(_PREFIX):
        folder = Path(name)
        if folder.is_dir():
            return _of_folder(folder)
        if not is_named(name):
            raise ConfigError(f"reference={name!r} is no folder and names no model. {_FORMS}")
        _require_safetensors(name)
        raise ConfigError(f"reference={name!r} holds weights, but of which model? {_FORMS}")
    model, _, weights = name.removeprefix(_PREFIX).partition("/")
    open_clip = _open_clip()
    if model not in open_clip.list_models():
        raise ConfigError(
            f"reference={name!r}: open_clip has no model {model!r}; see open_clip.list_models()."
        )
    known = open_clip.list_pretrained_tags_by_model(model)
    if not weights and len(known) == 1:
        weights = known[0]
    if not weights:
        raise ConfigError(
            f"reference={name!r} names no weights, and an untrained model cannot tell learnable "
            f"pairs from noise. {_FORMS} Known tags: {', '.join(known) or 'none'}. To use an "
            f"untrained one all the same, pass open_clip.create_model({model!r})."
        )
    if weights in known:
        return _created(open_clip, name, model, weights)
    if "/" in weights or Path(weights).suffix or Path(weights).exists():
        _require_safetensors(weights)
        if not Path(weights).is_file():
            raise ConfigError(f"reference={name!r}: there is no file {weights!r}. {_FORMS}")
        return _created(open_clip, name, model, weights, view=_view_of_all(open_clip, model, known))
    raise ConfigError(
        f"reference={name!r}: open_clip knows no weights {weights!r} of {model}; it knows "
        f"{', '.join(known) or 'none'}."
    )


def _of_folder(folder: Path) -> NamedReference:
    if not (folder / _WEIGHTS).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt"))
        _require_safetensors(others[0] if others else _WEIGHTS)
        raise ConfigError(f"reference={str(folder)!r} has no {_WEIGHTS}. {_FORMS}")
    # Of several files open_clip takes this one first.
    return _created(_open_clip(), str(folder), f"local-dir:{folder}", None)


def _view_of_all(open_clip: Any, model: str, tags: list[str]) -> dict[str, Any]:
    """Returns how the known weights of a model see images, if they all agree.

    open_clip would take CLIP's own mean, deviation and crop for a file of SigLIP's weights, too.
    """
    found = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    views = [{f"image_{key}": about[key] for key in _VIEW if key in about} for about in found]
    return views[0] if views and all(view == views[0] for view in views) else {}


def _created(
    open_clip: Any,
    name: str,
    model: str,
    weights: str | None,
    *,
    view: dict[str, Any] | None = None,
) -> NamedReference:
    try:
        module, _, transform = open_clip.create_model_and_transforms(
            model, pretrained=weights, **(view or {})
        )
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:
        raise ConfigError(f"reference={name!r} cannot be loaded by open_clip: {error}") from error
    return NamedReference(module=module.eval(), transform=transform, tokenizer=tokenizer)


def _require_safetensors(path: str) -> None:
    if Path(path).suffix != ".safetensors":
        raise UnsafeDataError(
            f"{path!r} is no .safetensors file. Other checkpoints can hold code that runs when "
            f"they are loaded: convert it once, where you trust it, with "
            f"safetensors.torch.save_file(state_dict, path), or pass the module itself. {_FORMS}"
        )


def _open_clip() -> Any:
    return importlib.import_module("open_clip")
