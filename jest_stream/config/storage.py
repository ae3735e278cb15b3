"""Defines `StorageConfig`: how remote shards are read, and the schemes of their addresses."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jest_stream.config.checks import as_integer, as_number, set_field
from jest_stream.errors import ConfigError

SCHEMES = ("s3", "gs", "http", "https", "hf")
"""The remote schemes that are read; `file` is local."""

_LEAST_READ_AHEAD = 1 << 20  # 1 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class StorageConfig:
    """Settings for reading remote shards. None of them concerns local paths."""

    cache_folder: str | None = None
    """Folder that keeps the shards read, for later epochs and other processes; None: none. Objects
    of servers that send no ETag are not kept, since a change would not be noticed."""
    cache_bytes: int = 64 << 30
    """Most bytes that the cache folder may hold."""
    read_ahead_bytes: int = 256 << 20
    """Most bytes read ahead in each process, over all of its open remote shards together. A single
    shard is read at most 32 MiB ahead; the more are open, the less each has."""
    connect_timeout_s: float = 10.0
    """Longest wait for a connection."""
    stall_timeout_s: float = 30.0
    """Longest wait for the next byte."""
    retry_timeout_s: float = 120.0
    """Longest time over all attempts of one read. A failed attempt is repeated, where that can
    help, after a pause that doubles; bytes that have arrived are not read again."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    """Arguments of fsspec's drivers by scheme, such as `{"s3": {"anon": True}}`; `"http"` is for
    `https://` too. Not in the repr, since they may hold secrets."""

    def __post_init__(self) -> None:
        if self.cache_folder is not None:
            if not self.cache_folder:
                raise ConfigError("StorageConfig.cache_folder is empty; pass a folder, or None.")
            set_field(self, "cache_folder", os.fspath(self.cache_folder))
        for name, num_bytes, least in (
            ("cache_bytes", self.cache_bytes, 1),
            ("read_ahead_bytes", self.read_ahead_bytes, _LEAST_READ_AHEAD),
        ):
            checked = as_integer(f"StorageConfig.{name}", num_bytes, least, "a number of bytes")
            set_field(self, name, checked)
        for name, seconds in (
            ("connect_timeout_s", self.connect_timeout_s),
            ("stall_timeout_s", self.stall_timeout_s),
            ("retry_timeout_s", self.retry_timeout_s),
        ):
            if not 0 < as_number(f"StorageConfig.{name}", seconds) < math.inf:
                raise ConfigError(
                    f"StorageConfig.{name} must be a number of seconds above 0, got {seconds!r}"
                )
        for scheme, options in self.options.items():
            # http and https share the entry "http".
            if scheme not in SCHEMES or scheme == "https":
                raise ConfigError(
                    f"StorageConfig.options names the scheme {scheme!r}; known are s3, gs, http "
                    "(also for https) and hf."
                )
            if not isinstance(options, Mapping):
                raise ConfigError(
                    f"StorageConfig.options[{scheme!r}] must be a dict of fsspec options, got "
                    f"{type(options).__name__}."
                )
