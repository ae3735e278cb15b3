"""Makes the view that candidates are scored on. Pure; runs where the examples are read."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jest_stream.config import DEFAULT_LIMITS, Key, Limits, Metadata, Term, Transform
from jest_stream.errors import CachedShardChangedError
from jest_stream.types import REFERENCE_ROW, Example
from jest_stream.views.compose import Reduction, SplitCompose
from jest_stream.views.decode import Decoded, Reduced, decode, title_of
from jest_stream.views.metadata import find, group_of, number_of, present_member
from jest_stream.views.rows import Row, add_view, as_rgb, raw_image

_UNKNOWN = 0  # checksum of an image that was decoded elsewhere, perhaps to other pixels


@dataclass(frozen=True, kw_only=True)
class ScoreView:
    """Makes the deterministic view that candidates are scored on, one row per example."""

    keys: tuple[Key, Key]
    """The members with an example's image and text."""
    learner: tuple[Transform | None, Transform | None]
    """Transform and tokenizer. None: the values are tensors already."""
    reference: tuple[Transform | None, Transform | None]
    """The reference's transform and tokenizer. None: it is given the learner's view."""
    keep_image: bool
    """Whether the undecoded image travels along, for a train view made later."""
    terms: Sequence[Term] = ()
    """Numbers of each example that count in its score; their weighted sum travels along."""
    group_by: Metadata | tuple[str, ...] | None = None
    """Metadata that name the example's group. None: no group travels along."""
    limits: Limits = DEFAULT_LIMITS
    """The largest members that are decoded."""
    reduction: Reduction | None = None
    """How far JPEGs are reduced while they are decoded. Then the transforms are `SplitCompose`."""
    for_cache: bool = False
    """Whether checksums of image and text travel along, for a cache to hold."""

    def __call__(self, example: Example) -> Row:
        """Returns the row of one example.

        Raises:
          BadExampleError: for members or metadata that are missing or unreadable.
          CachedShardChangedError: if its cached embeddings are of another image or text.
          ConfigError: for a value that no transform was given for, or a term that is no number.
        """
        decoded = Decoded(example, self.limits)
        image = self._image(example, decoded)
        text = find(decoded, self.keys[1], "text_key", "missing_text")
        row: Row = {"key": example["__key__"], "shard": example.get("__shard__", "")}
        add_view(row, "image", _viewed(self.learner[0], image))
        add_view(row, "text", text if self.learner[1] is None else self.learner[1](text))
        if self.reference[0] is not None:
            add_view(row, "reference_image", _viewed(self.reference[0], image))
        if self.reference[1] is not None:
            add_view(row, "reference_text", self.reference[1](text))
        # The image as it was read: checksums must not depend on the decoder, and a train view is
        # made of it anew.
        raw = raw_image(example, self.keys[0], image)
        if REFERENCE_ROW in example:
            _require_same(example, _checksum(raw[1]), _checksum(text))
            row[REFERENCE_ROW] = example[REFERENCE_ROW]
        if self.for_cache:
            row["checksums"] = torch.tensor([_checksum(raw[1]), _checksum(text)])
        if self.keep_image:
            row["raw_image"] = raw
        if self.terms:
            total = sum(term.weight * number_of(decoded, term) for term in self.terms)
            row["term"] = torch.tensor(total, dtype=torch.float32)
        if self.group_by is not None:
            row["group"] = group_of(decoded, self.group_by)
        return row

    def _image(self, example: Example, decoded: Decoded) -> Any:
        """Returns the picture; `Reduced` only where no function of the user's is given it."""
        key = self.keys[0]
        # A function may measure the image that it is given: only a member's name allows to reduce.
        if self.reduction is not None and isinstance(key, str):
            name = present_member(example, key)
            if name is not None:
                image = decode(example, name, self.limits, shrink=self.reduction)
                return image if isinstance(image, Reduced) else as_rgb(image, self.limits)
        return as_rgb(find(decoded, key, "image_key", "missing_image"), self.limits)


def _viewed(transform: Transform | None, image: Any) -> Any:
    if isinstance(image, Reduced):
        assert isinstance(transform, SplitCompose)
        return transform.of_reduced(image)
    return image if transform is None else transform(image)


def _require_same(example: Example, image_crc32: int, text_crc32: int) -> None:
    """Raises `CachedShardChangedError` if a cached example had another image or text."""
    # Names and lengths of shards that agree say little: a tar keeps its length when its captions
    # are written anew. An unknown checksum on either side proves nothing: the example passes.
    _, _, checksums, row = example[REFERENCE_ROW]
    names = [
        name
        for name, before, now in zip(
            ("image", "text"), checksums[row].tolist(), (image_crc32, text_crc32), strict=True
        )
        if _UNKNOWN not in (before, now) and before != now
    ]
    if names:
        raise CachedShardChangedError(
            f"the {' and the '.join(names)} of {title_of(example)} changed since the reference "
            f"embedded it, or image_key and text_key mean another member now, so its cached "
            f"embeddings are of something else. Build a cache of the data as they are.",
            shard=example.get("__shard__", ""),
        )


def _checksum(value: Any) -> int:
    """Returns the CRC-32 of a text or of an image as it was read; `_UNKNOWN` of other values."""
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    # A checksum of 0 would be taken for `_UNKNOWN`; 1 stands for it.
    return zlib.crc32(value) or 1 if isinstance(value, bytes) else _UNKNOWN
