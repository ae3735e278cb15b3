"""Shows how far a build is: a bar on a terminal, lines elsewhere, both on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

_EVERY_S = 10.0  # between lines


class BuildProgress:
    """Shows the shards and examples that are done, and the time left.

    Args:
      num_shards: shards to embed.
      num_examples: examples in them; None where the source has not counted them.
      is_shown: whether anything is shown at all.
    """

    def __init__(self, num_shards: int, num_examples: int | None, *, is_shown: bool) -> None:
        self._shards, self._num_shards = 0, num_shards
        self._examples, self._num_examples = 0, num_examples
        self._has_lines, self._bar = is_shown, None
        self._start = self._said = time.monotonic()
        if is_shown and sys.stderr.isatty():
            self._has_lines, self._bar = False, self._make_bar()
        elif is_shown:
            print(f"cache: {num_shards} shards to embed", file=sys.stderr, flush=True)

    def _make_bar(self) -> Any:
        # Only on a terminal: tqdm starts a thread even where it is disabled, and would take the
        # time left for 0 s where the number of examples is unknown.
        from tqdm import tqdm

        if self._num_examples is None:
            return tqdm(total=self._num_shards, unit="shard", desc="cache")
        return tqdm(total=self._num_examples, unit="example", unit_scale=True, desc="cache")

    def add(self, num_examples: int, *, num_shards: int = 0) -> None:
        """Counts examples that were embedded, and shards that were finished."""
        self._examples += num_examples
        self._shards += num_shards
        if self._bar is not None:
            self._bar.set_postfix_str(self._counts(), refresh=False)
            self._bar.update(num_shards if self._num_examples is None else num_examples)
        elif self._has_lines and time.monotonic() - self._said >= _EVERY_S:
            self._say()

    def __enter__(self) -> BuildProgress:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._has_lines and error is None:
            self._say()

    def _counts(self) -> str:
        return f"{self._shards} of {self._num_shards} shards, {self._examples:,} examples"

    def _say(self) -> None:
        self._said = time.monotonic()
        elapsed_s = self._said - self._start
        done, total = self._shards, self._num_shards
        if self._num_examples:
            done, total = self._examples, self._num_examples
        left = f"{elapsed_s * (total - done) / done:,.0f} s left" if done else "time left unknown"
        rate = self._examples / max(elapsed_s, 1e-9)
        print(f"cache: {self._counts()}, {rate:,.0f}/s, {left}", file=sys.stderr, flush=True)
