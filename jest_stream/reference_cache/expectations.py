"""What a cache must be of, compared with what it is of: nothing, or an error that says in what."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from jest_stream.config import Key
from jest_stream.errors import ConfigError, ReferenceMismatchError
from jest_stream.reference_cache import fingerprints
from jest_stream.reference_cache.manifest import Header
from jest_stream.scoring import is_named, load_reference

Expected = nn.Module | str | os.PathLike[str] | Mapping[str, Any]
"""The reference, as a module or by name; or some of `"reference"`, `"transform"` and `"tokenizer"`,
each a module or function or what `ReferenceCache.fingerprints` gives."""
_NAMES = ("reference", "transform", "tokenizer")


def require_expected(header: Header, expect: Expected, path: str) -> None:
    """Raises `ReferenceMismatchError` unless a cache is of what is expected."""
    expected = _by_name(expect)
    if unknown := sorted(set(expected) - set(_NAMES)):
        raise ConfigError(f"expect names {unknown}; known are {', '.join(_NAMES)}.")
    for name, value in expected.items():
        if name == "reference":
            difference = _weights_difference(header, value)
        elif name == "transform":
            wanted = value if _is_given(value) else fingerprints.transform_fingerprint(value)
            difference = fingerprints.view_difference(header.transform, wanted)
        else:
            wanted = value if _is_given(value) else fingerprints.tokenizer_fingerprint(value)
            difference = fingerprints.view_difference(header.tokenizer, wanted)
        if difference:
            raise ReferenceMismatchError(
                f"the reference cache {path!r} was built with another {name}: {difference}. Pass "
                f"what it was built with, or build a cache with this one."
            )


def require_keys(header: Header, image_key: Key, text_key: Key, path: str) -> None:
    """Raises `ReferenceMismatchError` if the members that were cached are surely others."""
    for name, cached, key in (
        ("image_key", header.image_key, image_key),
        ("text_key", header.text_key, text_key),
    ):
        if callable(key) or cached == "a function" or set(cached.split(";")) & set(key.split(";")):
            continue
        raise ReferenceMismatchError(
            f"the reference cache {path!r} was built with {name}={cached!r}, this dataset has "
            f"{name}={key!r}: learner and reference would see different things. Build a cache with "
            f"this {name}."
        )


def _by_name(expect: Expected) -> dict[str, Any]:
    if isinstance(expect, str | os.PathLike):
        named = load_reference(expect)
        views = {"transform": named.transform, "tokenizer": named.tokenizer}
        return {"reference": named.module, **views}
    return {"reference": expect} if isinstance(expect, nn.Module) else dict(expect)


def _weights_difference(header: Header, reference: object) -> str:
    if is_named(reference):
        reference = load_reference(reference).module  # type: ignore[arg-type]
    if isinstance(reference, nn.Module):
        found = fingerprints.weights_fingerprint(reference)
    elif isinstance(reference, str):
        found = reference
    else:
        raise ConfigError(
            f"expect's reference must be a module, the name of one or a fingerprint, got "
            f"{reference!r}"
        )
    if found == header.weights:
        return ""
    return (
        f"its weights have the fingerprint {found}, those of the cache's {header.model} "
        f"{header.weights}"
    )


def _is_given(value: Any) -> bool:
    """Whether it is a fingerprint already."""
    return isinstance(value, list)
