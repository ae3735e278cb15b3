"""Compares a cache with the user's expectations, and raises the error that names the difference.

Pure functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from jest_stream.config import Key
from jest_stream.errors import ConfigError, ReferenceMismatchError
from jest_stream.reference_cache import fingerprints
from jest_stream.reference_cache.fingerprints import ViewFingerprint
from jest_stream.reference_cache.manifest import Header
from jest_stream.scoring import is_named, load_reference

Expected = nn.Module | str | os.PathLike[str] | Mapping[str, Any]
"""The reference, as a module or by name; or some of `"reference"`, `"transform"` and `"tokenizer"`,
each a module or function, or its entry in `ReferenceCache.fingerprints`."""

_NAMES = ("reference", "transform", "tokenizer")


def require_expected(header: Header, expect: Expected, path: str) -> None:
    """Raises `ReferenceMismatchError` unless a cache is as expected."""
    expected = _by_name(expect)
    if unknown := sorted(set(expected) - set(_NAMES)):
        raise ConfigError(f"expect names {unknown}; known are {', '.join(_NAMES)}.")
    for name, value in expected.items():
        if name == "reference":
            difference = _weights_difference(header, value)
        elif name == "transform":
            wanted = _fingerprint(value, fingerprints.transform_fingerprint)
            difference = fingerprints.view_difference(header.transform, wanted)
        else:
            wanted = _fingerprint(value, fingerprints.tokenizer_fingerprint)
            difference = fingerprints.view_difference(header.tokenizer, wanted)
        if difference:
            raise ReferenceMismatchError(
                f"the reference cache {path!r} was built with another {name}: {difference}. Pass "
                f"the {name} that it was built with, or build a cache with this one."
            )


def require_keys(header: Header, image_key: Key, text_key: Key, path: str) -> None:
    """Raises `ReferenceMismatchError` if surely other members were cached."""
    # Functions cannot be compared. Names with one member in common may mean the same member in
    # every example: "jpg;png" and "jpg" do, unless some example has only a png.
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


def _fingerprint(value: Any, make: Callable[[Any], ViewFingerprint]) -> ViewFingerprint:
    """Returns a fingerprint as it is, and makes that of a function."""
    return value if isinstance(value, list) else make(value)


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
