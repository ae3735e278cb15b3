"""Super-batches are the examples of lanes in turn, of exact sizes, and read again from anywhere.

pytest tests/pipeline/test_super_batches.py
"""

from __future__ import annotations

from typing import Any

import pytest
from support.leaks import no_leaks  # noqa: F401
from support.pairs import Pairs, alone, key_of, sizes_of, stream_config

from jest_stream.pipeline.device.streams import Ring
from jest_stream.pipeline.super_batches import SuperBatch, SuperBatchReader
from jest_stream.sources import open_source

pytestmark = pytest.mark.usefixtures("no_leaks")


class Reading:
    """A reader of one rank, at the start of some lanes; a pass is read once unless told."""

    def __init__(self, lengths: list[int], *, end_epoch: int | None = 1, **options: Any) -> None:
        self.end_epoch = end_epoch
        self.reader = SuperBatchReader(
            stream_config(**options),
            sizes_of(2, 4),
            source=open_source(Pairs(lengths)),
            layout=alone(len(lengths)),
            prepare=key_of,
        )

    def read(self, size: int) -> SuperBatch:
        return self.reader.read(size, slot=Ring().slot(), end_epoch=self.end_epoch)

    def keys(self, size: int) -> list[str]:
        keys: list[str] = self.read(size).columns.get("key", [])
        return keys


def shards_of(keys: list[str]) -> list[str]:
    return [key.split("-")[0] for key in keys]


def test_lanes_take_turns_and_each_goes_through_its_shard_in_order() -> None:
    keys = Reading([3, 3, 3]).keys(9)
    assert [key.split("-")[1] for key in keys] == ["0", "0", "0", "1", "1", "1", "2", "2", "2"]
    first_round = shards_of(keys[:3])
    assert sorted(first_round) == ["0", "1", "2"]
    assert shards_of(keys) == 3 * first_round


def test_a_lane_that_has_ended_is_passed_over() -> None:
    keys = Reading([1, 3]).keys(9)
    assert len(keys) == 4 and set(keys) == {"0-0", "1-0", "1-1", "1-2"}
    assert keys[-2:] == ["1-1", "1-2"]


@pytest.mark.parametrize("sizes", [[1] * 9, [2, 3, 4], [5, 4], [4, 1, 4]])
def test_any_sizes_cut_the_same_stream(sizes: list[int]) -> None:
    whole = Reading([4, 2, 3]).keys(9)
    reading = Reading([4, 2, 3])
    parts = [reading.keys(size) for size in sizes]
    assert [len(part) for part in parts] == sizes
    assert sum(parts, []) == whole


def test_the_end_of_a_pass_gives_what_is_left_and_then_nothing() -> None:
    reading = Reading([3, 4])
    assert [reading.read(size).size for size in (5, 5, 5)] == [5, 2, 0]


def test_an_endless_stream_begins_its_lanes_anew() -> None:
    keys = Reading([2, 2], end_epoch=None).keys(8)
    assert sorted(keys[:4]) == sorted(keys[4:]) == ["0-0", "0-1", "1-0", "1-1"]


def test_going_to_the_start_of_a_super_batch_reads_it_and_all_after_it_again() -> None:
    """Three of two lanes: the second one starts in the middle of a round."""
    reading = Reading([4, 5])
    super_batches = [reading.read(3) for _ in range(3)]
    assert [each.position.next_lane for each in super_batches] == [0, 1, 0]
    for number, super_batch in enumerate(super_batches):
        reading.reader.go_to(super_batch.position)
        assert not reading.reader.is_open
        assert reading.reader.position == super_batch.position
        for later in super_batches[number:]:
            assert reading.keys(3) == later.columns["key"]


def test_a_pause_loses_and_repeats_nothing() -> None:
    whole, reading = Reading([4, 4]).keys(8), Reading([4, 4])
    keys = []
    for _ in range(4):
        keys += reading.keys(2)
        reading.reader.pause()
    assert keys == whole


def test_the_position_moves_by_the_examples_dealt_out_not_by_those_read() -> None:
    reading = Reading([6, 6])
    reading.keys(3)
    cursors = reading.reader.position.cursors
    assert [cursors[lane].num_before for lane in (0, 1)] == [2, 1]


def test_rows_come_in_the_order_of_their_keys() -> None:
    columns = Reading([3, 5, 2]).read(8).columns
    images = columns["image"][:, 0, 0, 0].tolist()
    assert images == [float(shard) + 1 for shard in shards_of(columns["key"])]
