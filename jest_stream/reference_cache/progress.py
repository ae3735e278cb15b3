"""How far a build is: a bar on a terminal, lines elsewhere, on standard error; or nothing."""

from __future__ import annotations

import importlib
import sys
import time
from types import TracebackType
from typing import Any

_EVERY_S = 10.0


class ProgressLine:
    """Shows shards and examples that are done, the rate, and the time left.

    Args:
      num_shards: to be done.
      num_examples: in them; None if nobody knows.
      is_shown: whether anything is shown at all.
    """

    def __init__(self, num_shards: int, num_examples: int | None, *, is_shown: bool) -> None:
        self._num_shards = num_shards
        self._total = num_examples
        self._is_shown = is_shown
        self._done = self._shards_done = 0
        self._start = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> ProgressLine:
        if self._is_shown and sys.stderr.isatty() and (tqdm := _tqdm()) is not None:
            counts_examples = self._total is not None
            self._bar = tqdm(
                total=self._total if counts_examples else self._num_shards,
                unit="example" if counts_examples else "shard",
                unit_scale=counts_examples,
                desc="cache",
            )
        elif self._is_shown:
            self._say(f"cache: {self._num_shards} shards to embed")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._is_shown and error is None:
            self._say(self.text())

    def add(self, num_examples: int) -> None:
        """Notes examples that were embedded."""
        self._done += num_examples
        if self._bar is not None:
            if self._total is not None:
                self._bar.update(num_examples)
            else:
                self._bar.set_postfix_str(f"{self._rate():,.0f} examples/s", refresh=False)
                self._bar.refresh()
        elif self._is_shown and time.monotonic() - self._said >= _EVERY_S:
            self._say(self.text())

    def end_shard(self) -> None:
        """Notes a shard that is done."""
        self._shards_done += 1
        if self._bar is not None and self._total is None:
            self._bar.update(1)

    def text(self) -> str:
        """Returns what a line says."""
        share = self._done / self._total if self._total else self._shards_done / self._num_shards
        elapsed_s = time.monotonic() - self._start
        left = f"{elapsed_s * (1 - share) / share:,.0f} s left" if share else "time left unknown"
        return (
            f"cache: {self._shards_done} of {self._num_shards} shards, {self._done:,} examples, "
            f"{self._rate():,.0f}/s, {left}"
        )

    def _rate(self) -> float:
        return self._done / max(time.monotonic() - self._start, 1e-9)

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(text, file=sys.stderr, flush=True)


def _tqdm() -> Any:
    try:
        return importlib.import_module("tqdm").tqdm
    except ImportError:
        return None  # lines do as well
