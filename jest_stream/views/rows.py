"""Makes the row of one example: a flat dict of tensors and plain values. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jest_stream.config import Key, Limits
from jest_stream.errors import ConfigError
from jest_stream.types import Example
from jest_stream.views.decode import Decoded
from jest_stream.views.metadata import present_member

Row = dict[str, Any]


def as_rgb(image: Any, limits: Limits) -> Any:
    """Returns PIL images as RGB, and anything else as it is."""
    if isinstance(image, bytes):  # returned by a function of the user's
        image = Decoded({"image": image}, limits)["image"]
    mode = getattr(image, "mode", "RGB")
    return image if mode == "RGB" or not hasattr(image, "convert") else image.convert("RGB")


def raw_image(example: Example, key: Key, image: Any) -> tuple[str, Any]:
    """Returns the image as it was read, after the name of its member, which tells the decoder."""
    name = "image" if callable(key) else present_member(example, key)
    assert name is not None  # else the image would not have been found
    return name, image if callable(key) else example[name]


def add_view(row: Row, name: str, view: Any, argument: str = "") -> None:
    """Puts a view into the row, without the batch dimension of one that processors add."""
    # There are four cases: 1. a mapping of tensors, as processors return. 2. A tensor or array.
    # 3. A text without a tokenizer: it stays a string. 4. Anything else, such as a PIL image.
    is_text = name.endswith("text")
    single_dim = 1 if is_text else 3  # dimensions without a batch: [L] ids, [C, H, W] pixels
    if isinstance(view, Mapping):
        entries = {key: torch.as_tensor(value) for key, value in view.items()}
        # Processors that make patches give images of two dimensions, like a batch of texts: that
        # there is a batch dimension is seen when all entries begin with a 1.
        is_batch = len(entries) > 1 and all(
            entry.dim() > 1 and len(entry) == 1 for entry in entries.values()
        )
        for key, entry in entries.items():
            row[f"{name}/{key}"] = entry[0] if is_batch else _unbatched(entry, single_dim)
    elif isinstance(view, Tensor | np.ndarray):
        row[name] = _unbatched(torch.as_tensor(view), single_dim)
    elif is_text and isinstance(view, str):
        row[name] = view
    else:
        kind, usual = ("text", "tokenizer") if is_text else ("image", "transform")
        raise ConfigError(
            f"{name} of example {row['key']!r} is a {type(view).__name__}, but models take "
            f"tensors (or mappings of tensors). Pass {argument or usual}=, a function that turns "
            f"the {kind} into one."
        )


def _unbatched(tensor: Tensor, single_dim: int) -> Tensor:
    return tensor[0] if tensor.dim() == single_dim + 1 and len(tensor) == 1 else tensor
