"""Tells where an example has its image and text, and which functions make tensors of them.

`ViewConfig` gathers these arguments of a `JESTDataset`; `Limits` bounds the members that are
decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jest_stream.config.checks import (
    as_integer,
    require_function,
    require_key,
    require_one_of,
    set_field,
)
from jest_stream.errors import ConfigError

Transform = Callable[[Any], Any]
"""A function that turns one image or one text into a tensor, or into a mapping of tensors."""
Key = str | Callable[[Mapping[str, Any]], Any]
"""A member, or alternatives such as `"jpg;png"`, of which the first present one counts; or a
function of the example, which sees decoded members."""
TrainViewFrom = Literal["auto", "encoded", "score_view"]
ReducedDecoding = bool | Literal["auto"]

DEFAULT_IMAGE_KEY = "jpg;jpeg;png;webp;gif;image"
DEFAULT_TEXT_KEY = "txt;text"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The largest values that are decoded; an example that exceeds one is a bad example.

    Checked before memory is taken. Pictures and texts that a source yields ready made are not
    looked at; of arrays (npy) the bytes must make up the size that their header promises.
    """

    max_pixels: int = 25_000_000
    """Width times height of an image: 25 million take 75 MB as RGB."""
    max_text_bytes: int = 1 << 20
    """Bytes of a caption or of a json member; parsed, json can take 50 times as much memory."""

    def __post_init__(self) -> None:
        set_field(self, "max_pixels", as_integer("Limits.max_pixels", self.max_pixels, 1))
        max_text_bytes = as_integer("Limits.max_text_bytes", self.max_text_bytes, 1)
        set_field(self, "max_text_bytes", max_text_bytes)


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """The functions that make views of an example. `JESTDataset` explains the fields."""

    image_key: Key
    text_key: Key
    transform: Transform | None
    tokenizer: Transform | None
    train_transform: Transform | None
    train_view_from: TrainViewFrom
    reduced_decoding: ReducedDecoding
    reference_transform: Transform | None
    reference_tokenizer: Transform | None
    limits: Limits

    def __post_init__(self) -> None:
        require_key("image_key", self.image_key)
        require_key("text_key", self.text_key)
        require_function("transform", self.transform)
        require_function("tokenizer", self.tokenizer)
        require_function("train_transform", self.train_transform)
        require_function("reference_transform", self.reference_transform)
        require_function("reference_tokenizer", self.reference_tokenizer)
        require_one_of("train_view_from", self.train_view_from, ("auto", "encoded", "score_view"))
        require_one_of("reduced_decoding", self.reduced_decoding, ("auto", True, False))
        if not isinstance(self.limits, Limits):
            raise ConfigError(f"limits must be a Limits object or None, got {self.limits!r}")
