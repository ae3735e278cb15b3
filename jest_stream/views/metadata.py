"""Looks up members of a decoded example.

Image and text are for the views, term and group for selection. Pure functions; they run where the
examples are read.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from jest_stream.config import Key, Metadata, Term
from jest_stream.errors import BadExampleError, ConfigError
from jest_stream.views.decode import Decoded, place_of, title_of


def present_member(example: Mapping[str, Any], key: str) -> str | None:
    """Returns the first of the alternatives in `key` that an example has; None if it has none."""
    return next((name for name in key.split(";") if name in example), None)


def find(decoded: Decoded, key: Key, argument: str, reason: str) -> Any:
    """Returns the member that `key` means; raises `BadExampleError` if there is none."""
    if callable(key):
        return key(decoded)
    name = present_member(decoded, key)
    if name is not None:
        return decoded[name]
    known = sorted(name for name in decoded if not name.startswith("__"))
    problem = f"has no member for {argument}={key!r}, only {known}"
    raise _bad(decoded, f"{problem} (should {argument} be one of these?)", reason)


def _metadata(decoded: Decoded, key: Metadata, role: str) -> Any:
    # There are three cases: 1. a function of the user's; 2. a member; 3. an entry of the `json`
    # member, which is decoded only here.
    if callable(key):
        return key(decoded)
    if key in decoded:
        return decoded[key]
    about = decoded["json"] if "json" in decoded else {}
    entries = about if isinstance(about, Mapping) else {}
    if key in entries:
        return entries[key]
    known = sorted({name for name in decoded if not name.startswith("__")} | entries.keys())
    raise _bad(decoded, f"has no {key!r} for {role}, only {known}", f"missing_{role}")


def number_of(decoded: Decoded, term: Term) -> float:
    """Returns the number of a term; raises `BadExampleError` where the example has none."""
    value = _metadata(decoded, term.value, "term")
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) != 1:
        raise ConfigError(
            f"Term(value={term.value!r}) must give one number per example, got shape "
            f"{list(value.shape)} for {decoded['__key__']!r}."
        )
    if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
        raise ConfigError(
            f"Term(value={term.value!r}) must give one number per example, got a "
            f"{type(value).__name__} for {decoded['__key__']!r}. Pass a function that makes one "
            f"number of it."
        )
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise _bad(
            decoded, f"has {value!r} for {term.value!r}, no number", "unreadable_term"
        ) from error
    if not math.isfinite(number):
        raise _bad(decoded, f"has {number} for {term.value!r}", "non_finite_term")
    return number


def group_of(decoded: Decoded, group_by: Metadata | tuple[str, ...]) -> Hashable:
    """Returns the group of an example; of several keys, their values in a tuple."""
    if isinstance(group_by, tuple):
        return tuple(group_of(decoded, key) for key in group_by)
    value = _metadata(decoded, group_by, "group")
    if not isinstance(value, Hashable):
        raise ConfigError(
            f"group_by={group_by!r} must give a value that can be a key of quotas, got a "
            f"{type(value).__name__} for {decoded['__key__']!r}. Pass a function that makes one "
            f"of it."
        )
    return value


def _bad(decoded: Decoded, problem: str, reason: str) -> BadExampleError:
    return BadExampleError(
        f"{title_of(decoded)} {problem}. Repair the data, pass a function that does without, or "
        f'on_bad_example="skip" to leave such examples out and count them.',
        **place_of(decoded),
        reason=reason,
    )
