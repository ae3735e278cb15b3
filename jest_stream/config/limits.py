"""The largest images and texts that are decoded."""

from __future__ import annotations

from dataclasses import dataclass

from jest_stream.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest values that are decoded; what exceeds one is a bad example.

    Checked before memory is taken. Pictures and texts that a source yields ready made are not
    looked at; of arrays (npy) the bytes must make up what their header promises.
    """

    max_pixels: int = 25_000_000
    """Width times height of an image: 25 million take 75 MB as RGB."""
    max_text_bytes: int = 1 << 20
    """Of a caption, or of a json member: what it parses to can take 50 times as much."""

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_text_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"Limits.{name} must be an integer of at least 1, got {value!r}")


DEFAULT_LIMITS = Limits()
