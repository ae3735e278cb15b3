"""Tests of several modules open their reader of blocks here."""

from __future__ import annotations

from typing import Any

from jest_stream.sources import open_source
from jest_stream.sources.reader import BlockReader
from jest_stream.types import Cursor, Example


def key_of(example: Example) -> str:
    """The least that can be made of an example."""
    return str(example["__key__"])


def open_reader(source: Any, *, num_lanes: int, **changes: Any) -> BlockReader:
    """Reads keys in blocks of 3, one pass over all lanes, in this process; unless told otherwise.

    The lanes that are read are those of `cursors`.
    """
    settings: dict[str, Any] = {
        "cursors": {lane: Cursor(0, 0, 0, 0) for lane in range(num_lanes)},
        "seed": 0,
        "block_size": 3,
        "prepare": key_of,
        "collate": list,
        "end_epoch": 1,
        "on_bad_example": "raise",
        "num_workers": 0,
        "timeout_s": 60.0,
        **changes,
    }
    return BlockReader(
        open_source(source), lanes=list(settings["cursors"]), num_lanes=num_lanes, **settings
    )
