"""Checks single settings: each check returns the value in its one form, or raises.

A value goes in, and the name that the user knows it by. `as_...` returns the value in its one form,
`require_...` returns nothing; both raise `ConfigError` with the name, the rule and the value.
"""

from __future__ import annotations

import math
import operator
from typing import Any, TypeVar

import torch

from jest_stream.errors import ConfigError

_Config = TypeVar("_Config")


def as_integer(name: str, value: object, least: int, kind: str = "an integer") -> int:
    """Returns `value` as an int; integers of numpy and torch are accepted.

    Raises:
      ConfigError: unless it is an integer of at least `least`. The message calls it `kind`.
    """
    try:
        # operator.index takes True for 1. A user who passes True as a size has mixed up arguments.
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < least:
        raise ConfigError(f"{name} must be {kind} of at least {least:,}, got {value!r}")
    return number


def as_optional_integer(name: str, value: object, least: int) -> int | None:
    """Returns `as_integer(name, value, least)`, or None for None."""
    return None if value is None else as_integer(name, value, least)


def as_number(name: str, value: object) -> float:
    """Returns `value` as a float, NaN and infinity included; text and booleans are no numbers."""
    try:
        if isinstance(value, str | bytes | bool):  # float() would take them
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be a number, got {value!r}") from None


def as_finite(name: str, value: object) -> float:
    """Returns `value` as a float that is neither NaN nor infinite."""
    number = as_number(name, value)
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be finite, got {value}")
    return number


def as_device(name: str, device: object) -> torch.device | None:
    """Returns the device of that name, or None for None. It need not exist on this machine."""
    try:
        return None if device is None else torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{name} must be a device such as 'cuda:0' or 'cpu', got {device!r}"
        ) from error


def as_config(name: str, config: object, kind: type[_Config], example: str) -> _Config:
    """Returns `config`, or for None the default of its kind; the message quotes the example."""
    if config is None:
        return kind()
    if isinstance(config, kind):
        return config
    raise ConfigError(
        f"{name} must be a {kind.__name__}, got {config!r}. Write for example {example}."
    )


def require_bool(name: str, value: object) -> None:
    """Raises `ConfigError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


def require_share(name: str, value: object) -> None:
    """Raises `ConfigError` unless `value` is a number in [0, 1]."""
    if not 0 <= as_number(name, value) <= 1:
        raise ConfigError(f"{name} must be a share in [0, 1], got {value}")


def require_function(name: str, function: object) -> None:
    """Raises `ConfigError` unless `function` can be called or is None."""
    if function is not None and not callable(function):
        raise ConfigError(
            f"{name} must be a function of one image or text, or None, got {function!r}"
        )


def require_key(name: str, key: object) -> None:
    """Raises `ConfigError` unless `key` names members or is a function of the example."""
    if not callable(key) and not (isinstance(key, str) and key):
        raise ConfigError(
            f"{name} must be the name of a member, alternatives such as 'jpg;png', or a function "
            f"of the decoded example, got {key!r}"
        )


def require_one_of(name: str, value: Any, allowed: tuple[Any, ...], more: str = "") -> None:
    """Raises `ConfigError` unless `value` is one of `allowed`; `more` ends their list."""
    if value not in allowed:
        names = ", ".join(repr(item) for item in allowed)
        raise ConfigError(f"{name} must be one of {names} {more}".rstrip() + f", got {value!r}")


def set_field(config: object, name: str, value: object) -> None:
    """Sets a field of a frozen config to its checked form. Only from its `__post_init__`."""
    object.__setattr__(config, name, value)
