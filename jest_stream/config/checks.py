"""Checks of what the user passed: each returns it in its one form, or says what is wrong."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch

from jest_stream.errors import ConfigError


def as_integer(name: str, value: object, least: int) -> int:
    """Returns `value` as an int; numpy's and torch's integers are integers too.

    Raises:
      ConfigError: unless it is an integer of at least `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    return number


def as_number(name: str, value: object) -> float:
    """Returns `value` as a float; `ConfigError` for text, None and what else is no number."""
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be a number, got {value!r}") from None


def require_bool(name: str, value: object) -> bool:
    """Returns `value`, or raises `ConfigError` unless it is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")
    return value


def require_functions(functions: Mapping[str, object]) -> None:
    """Raises `ConfigError` for what is neither None nor can be called, under its name."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ConfigError(
                f"{name} must be a function of one image or text, or None, got {function!r}"
            )


def as_device(name: str, device: object) -> torch.device | None:
    """Returns what `device` names, or None for None; `ConfigError` if it names nothing."""
    try:
        return None if device is None else torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{name} must be a device such as 'cuda:0' or 'cpu', got {device!r}"
        ) from error


def require_key(name: str, key: object) -> None:
    """Raises `ConfigError` unless `key` names members or is a function of the example."""
    if not callable(key) and not (isinstance(key, str) and key):
        raise ConfigError(
            f"{name} must be the name of a member, alternatives such as 'jpg;png', or a function "
            f"of the decoded example, got {key!r}"
        )


def finite(name: str, value: object) -> float:
    """Returns `value` as a float; `ConfigError` unless it is a finite number."""
    number = as_number(name, value)
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be finite, got {value}")
    return number


def set_field(config: object, name: str, value: object) -> None:
    """Sets a field of a frozen config to its checked value, while it is made."""
    object.__setattr__(config, name, value)


def require_one_of(name: str, value: Any, allowed: tuple[Any, ...], more: str = "") -> None:
    """Raises `ConfigError` unless `value` is one of the allowed; `more` names what else is."""
    if value not in allowed:
        names = ", ".join(repr(item) for item in allowed)
        raise ConfigError(f"{name} must be one of {names} {more}".rstrip() + f", got {value!r}")
