"""A pass ends on every rank after as many batches as the poorest rank can make.

pytest tests/pipeline/test_pass_length.py
"""

from __future__ import annotations

import pytest
from support.leaks import no_leaks  # noqa: F401
from support.pairs import Pairs, sizes_of, stream_config

from jest_stream.config import Layout
from jest_stream.errors import ConfigError, ResumeMismatchError
from jest_stream.pipeline.epochs import PassLength, shard_counts
from jest_stream.sources import open_source
from jest_stream.types import Cursor

pytestmark = pytest.mark.usefixtures("no_leaks")


def length_of(counts: list[int], *, batch_size: int, super_batch_size: int) -> PassLength:
    return PassLength(counts=counts, sizes=sizes_of(batch_size, super_batch_size), seed=0)


def ranks(world_size: int, num_lanes: int) -> Layout:
    return Layout(num_lanes=num_lanes, rank=0, world_size=world_size)


@pytest.mark.parametrize(
    ("counts", "batch_size", "super_batch_size", "batches"),
    [
        ([8, 8], 2, 4, 2),  # each rank: 4 + 4 examples
        ([8, 9], 2, 4, 2),  # the ninth example is left out
        ([8, 10], 2, 4, 2),  # two more would be a batch, on one rank only
        ([10, 10], 2, 4, 3),  # 4 + 4, and a last super-batch of 2
        ([3, 8], 2, 4, 1),  # one short super-batch on the poor rank
    ],
)
def test_the_poorest_rank_decides(
    counts: list[int], batch_size: int, super_batch_size: int, batches: int
) -> None:
    """One shard is one lane here, and each of two ranks reads one of them."""
    length = length_of(counts, batch_size=batch_size, super_batch_size=super_batch_size)
    assert length.batches_from_start(ranks(2, 2), epoch=0, step=0) == batches


def test_a_rank_without_a_batch_is_an_error() -> None:
    length = length_of([1, 8], batch_size=2, super_batch_size=4)
    with pytest.raises(ConfigError, match="9 examples in 2 shards gives one of the 2 ranks fewer"):
        length.batches_from_start(ranks(2, 2), epoch=0, step=0)


def test_cursors_within_shards_count_what_lies_after_them() -> None:
    length = length_of([5, 5], batch_size=1, super_batch_size=1)
    cursors = {0: Cursor(0, 0, 0, 3), 1: Cursor(1, 0, 0, 0)}  # 3 of lane 0 are read; 1 has ended
    assert length.num_left(cursors, ranks(1, 2), epoch=0) == 2


def test_all_lanes_are_needed_to_tell_the_end_on_other_ranks() -> None:
    length = length_of([5, 5], batch_size=1, super_batch_size=1)
    with pytest.raises(ResumeMismatchError, match="holds 1 of 2 lanes"):
        length.batches_left({0: Cursor(0, 0, 0, 0)}, ranks(2, 2), epoch=0, step=0)


def test_one_rank_or_endless_data_need_no_common_end() -> None:
    source, sizes = open_source(Pairs([4, 4])), sizes_of(2, 4)
    assert PassLength.of(source, stream_config(repeat=True), sizes, 2) is None
    assert PassLength.of(source, stream_config(repeat=False), sizes, 1) is None
    assert PassLength.of(source, stream_config(repeat=False), sizes, 2) is not None


@pytest.mark.parametrize("counts", [None, [4, None]])
def test_counts_that_are_not_all_known_are_none(counts: object) -> None:
    assert shard_counts(open_source(Pairs([4, 4], counts))) is None


def test_a_wrong_number_of_counts_is_an_error() -> None:
    with pytest.raises(ConfigError, match="3 entries for 2 shards"):
        shard_counts(open_source(Pairs([4, 4], [4, 4, 4])))
