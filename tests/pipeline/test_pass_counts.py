"""The examples left of a pass are those that the reader goes on to read; unknown counts are errors.

pytest tests/pipeline/test_pass_counts.py
"""

from __future__ import annotations

from typing import Any

import pytest
from support.leaks import no_leaks  # noqa: F401
from support.pairs import Pairs, alone, key_of, sizes_of, stream_config

from jest_stream.config import Layout, Sizes
from jest_stream.errors import ConfigError
from jest_stream.pipeline.device import Ring
from jest_stream.pipeline.epochs import PassLength, shard_counts
from jest_stream.pipeline.super_batches import Position, SuperBatchReader
from jest_stream.sources import open_source
from jest_stream.types import Cursor

pytestmark = pytest.mark.usefixtures("no_leaks")


def length_of(counts: list[int], sizes: Sizes) -> PassLength:
    return PassLength(counts=counts, sizes=sizes, seed=0)


@pytest.mark.parametrize(
    ("cursor", "left"),
    [
        (Cursor(epoch=0, shard=0, offset=0, num_before=0), 5 + 5 + 5),
        (Cursor(epoch=0, shard=0, offset=0, num_before=4), 1 + 5 + 5),
        (Cursor(epoch=0, shard=1, offset=0, num_before=3), 2 + 5),
        (Cursor(epoch=0, shard=2, offset=0, num_before=5), 0),
        (Cursor(epoch=0, shard=3, offset=0, num_before=0), 0),
        (Cursor(epoch=1, shard=0, offset=0, num_before=0), 0),  # it has ended this pass
    ],
)
def test_a_lane_has_the_rest_of_its_shard_and_the_shards_after_it_left(
    cursor: Cursor, left: int
) -> None:
    """One lane of three shards, 5 examples each: in any order."""
    length = length_of([5, 5, 5], sizes_of(1, 1))
    assert length.num_left({0: cursor}, alone(1), epoch=0) == left


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_examples_left_are_those_that_the_reader_has_not_dealt_out(epoch: int) -> None:
    """Two lanes of shards with 5, 4, 6, 1 and 3 examples, in another order in each pass."""
    lengths, sizes = [5, 4, 6, 1, 3], sizes_of(1, 1)
    reader = SuperBatchReader(
        stream_config(), sizes, source=open_source(Pairs(lengths)), layout=alone(2), prepare=key_of
    )
    reader.go_to(Position.of_epoch(epoch, alone(2).lanes))
    length, slot = length_of(lengths, sizes), Ring().slot()
    left = [length.num_left(reader.position.cursors, alone(2), epoch)]
    for _ in range(19):
        reader.read(1, slot=slot, end_epoch=epoch + 1)
        left.append(length.num_left(reader.position.cursors, alone(2), epoch))
    assert left == list(range(19, -1, -1))


@pytest.mark.parametrize(
    ("step", "batches"),
    [
        (0, 4),  # 10 = 2 + 2 + 2 + 4
        (1, 4),  # 10 = 2 + 2 + 4, and a last super-batch of 2
        (3, 3),  # 10 = 4 + 4, and a last super-batch of 2
    ],
)
def test_super_batches_that_grow_with_the_steps_make_fewer_batches(step: int, batches: int) -> None:
    growing = Sizes(batch_size=2, changes=((0, 2), (3, 4)), stream_size=4)
    length = length_of([10], growing)
    assert length.batches_from_start(alone(1), epoch=0, step=step) == batches


def test_ranks_end_together_from_any_place_in_the_pass() -> None:
    """Rank 0 reads lanes 0 and 2, rank 1 lanes 1 and 3; each lane has one shard of 6."""
    length = length_of([6, 6, 6, 6], sizes_of(2, 4))
    cursors = {
        0: Cursor(0, 0, 0, 5),  # 1 left
        1: Cursor(0, 0, 0, 0),  # 6 left
        2: Cursor(0, 0, 0, 1),  # 5 left: rank 0 has 6 = 4 + 2
        3: Cursor(1, 0, 0, 0),  # none left: rank 1 has 6 too
    }
    layout = Layout(num_lanes=4, rank=1, world_size=2)
    assert length.batches_left(cursors, layout, epoch=0, step=0) == 2
    cursors[1] = Cursor(0, 0, 0, 2)  # 4 left: one super-batch
    assert length.batches_left(cursors, layout, epoch=0, step=0) == 1


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        (None, {}, "on 3 ranks .* does not know how many examples its shards hold"),
        ([4, None], {}, "on 3 ranks .* does not know how many examples its shards hold"),
        (
            [4, 4],
            {"on_bad_example": "skip"},
            "on_bad_example='skip' and on_bad_shard='raise' leave",
        ),
        ([4, 4], {"on_bad_shard": "skip"}, "on_bad_example='raise' and on_bad_shard='skip' leave"),
    ],
)
def test_a_pass_that_could_end_on_one_rank_alone_is_an_error(
    counts: object, options: dict[str, Any], message: str
) -> None:
    source, config = open_source(Pairs([4, 4], counts)), stream_config(repeat=False, **options)
    with pytest.raises(ConfigError, match=message):
        PassLength.of(source, config, sizes_of(2, 4), 3)
    assert PassLength.of(source, config, sizes_of(2, 4), 1) is None, "one rank may end as it likes"


@pytest.mark.parametrize("wrong", [-1, 2.5, "4"])
def test_a_count_that_is_no_number_of_examples_is_an_error(wrong: object) -> None:
    with pytest.raises(ConfigError, match="each of source.num_examples must be an integer"):
        shard_counts(open_source(Pairs([4, 4], [4, wrong])))


def test_the_counts_are_those_of_the_source() -> None:
    assert shard_counts(open_source(Pairs([5, 0, 6]))) == [5, 0, 6]
