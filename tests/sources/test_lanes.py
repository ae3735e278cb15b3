"""Lanes are dealt once, the same for everybody, each example in exactly one, resumable anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.leaks import no_leaks  # noqa: F401

from jest_stream.errors import BadExampleError, ConfigError, ShardError
from jest_stream.sources.lanes import Lane, lane_shards, num_lanes, shard_order
from jest_stream.types import Cursor, Example

pytestmark = pytest.mark.usefixtures("no_leaks")

START = Cursor(0, 0, 0, 0)


class Counted:
    """A source of shards with so many examples each, named `shard/index`."""

    def __init__(self, *sizes: int, fails_at: str = "") -> None:
        self._sizes = sizes
        self._fails_at = fails_at
        self.num_closed = 0

    @property
    def num_shards(self) -> int:
        return len(self._sizes)

    @property
    def fingerprint(self) -> str:
        return str(self._sizes)

    def shard_name(self, shard: int) -> str:
        return f"shard {shard}"

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        try:
            for i in range(index, self._sizes[shard]):
                assert offset in (0, 10 * index)
                if f"{shard}/{i}" == self._fails_at:
                    raise OSError("disk on fire")
                yield {"__key__": f"{shard}/{i}"}, 10 * (i + 1)
        finally:
            self.num_closed += 1


def keys(lane: Lane, count: int) -> list[str]:
    return [example["__key__"] for example, _ in (next(lane) for _ in range(count))]


def make_lane(source: Counted, **changes: object) -> Lane:
    settings = {"lane": 0, "num_lanes": 1, "seed": 0, "cursor": START, **changes}
    return Lane(source, **settings)  # type: ignore[arg-type]


#       shards  super-batch  ranks  lanes
SIZES = [
    (1000, 1280, 1, 64),  # the most that is taken by default
    (50, 1280, 1, 40),
    (7, 1280, 1, 5),
    (7, 1281, 1, 7),
    (1, 1280, 1, 1),
    (1000, 1280, 4, 64),
    (1000, 1280, 5, 40),  # 64 does not hold 5
    (8, 96, 4, 8),
    (1000, 1280, 128, 128),  # more ranks than the default lanes
    (1000, 7, 1, 7),
    (1000, 107, 1, 64),  # a prime: mixing shards matters more than dividing
    (1000, 214, 2, 64),
    (9, 1280, 3, 9),
]


@pytest.mark.parametrize(("num_shards", "size", "world_size", "expected"), SIZES)
def test_the_number_of_lanes_is_the_largest_that_fits(
    num_shards: int, size: int, world_size: int, expected: int
) -> None:
    assert num_lanes(num_shards, size, world_size) == expected


def test_lanes_that_do_not_fit_are_explained_with_the_numbers() -> None:
    assert num_lanes(100, 1280, 2, requested=10) == 10
    with pytest.raises(ConfigError, match=r"lanes=6 .* 1280 .* 2, 4, 8, 10"):
        num_lanes(10, 1280, 2, requested=6)
    with pytest.raises(ConfigError, match=r"lanes=20 .* 10 shards"):
        num_lanes(10, 1280, 2, requested=20)
    with pytest.raises(ConfigError, match="lanes=0"):
        num_lanes(10, 1280, 2, requested=0)
    with pytest.raises(ConfigError, match="4 ranks need at least 4 shards"):
        num_lanes(3, 1280, 4)


def test_each_shard_is_dealt_to_one_lane_and_the_seed_decides_which() -> None:
    hands = [lane_shards(11, 4, lane, seed=3) for lane in range(4)]
    assert sorted(shard for hand in hands for shard in hand) == list(range(11))
    assert [len(hand) for hand in hands] == [3, 3, 3, 2]
    assert hands == [lane_shards(11, 4, lane, seed=3) for lane in range(4)]
    assert hands != [lane_shards(11, 4, lane, seed=4) for lane in range(4)]


def test_shards_stay_in_their_lane_and_change_order_every_epoch() -> None:
    shards = list(range(40, 50))
    orders = [shard_order(shards, 1, 0, epoch) for epoch in range(3)]
    assert all(sorted(order) == shards for order in orders)
    assert len(set(map(tuple, orders))) == 3  # false alarm: 3 / 10! = 1e-6, fixed by the seed


def test_a_lane_gives_every_example_once_per_epoch() -> None:
    lane = make_lane(Counted(3, 0, 4, 2), end_epoch=2)
    drawn = [example["__key__"] for example, _ in lane]
    expected = sorted(
        f"{shard}/{i}" for shard, size in ((0, 3), (2, 4), (3, 2)) for i in range(size)
    )
    assert sorted(drawn[:9]) == sorted(drawn[9:]) == expected
    assert next(lane, None) is None  # and again


def test_a_lane_resumed_at_any_cursor_gives_the_rest() -> None:
    source = Counted(3, 0, 4, 1, 2)
    cursors, drawn = [START], []
    for example, cursor in make_lane(source, end_epoch=3):
        drawn.append(example["__key__"])
        cursors.append(cursor)
    for position, cursor in enumerate(cursors):
        rest = make_lane(source, cursor=cursor, end_epoch=3)
        assert [example["__key__"] for example, _ in rest] == drawn[position:]


def test_an_endless_lane_goes_on_to_the_next_epoch() -> None:
    lane = make_lane(Counted(2))
    assert keys(lane, 5) == ["0/0", "0/1", "0/0", "0/1", "0/0"]
    assert lane.cursor == Cursor(2, 0, 10, 1)


def test_a_lane_without_examples_raises_instead_of_spinning() -> None:
    for end_epoch in (None, 1):
        with pytest.raises(ShardError, match=r"no example in all of its 2 shards .*KEY.EXTENSION"):
            next(make_lane(Counted(0, 0), end_epoch=end_epoch))


def test_a_lane_resumed_at_the_end_of_its_epoch_is_not_taken_for_empty() -> None:
    lane = make_lane(Counted(2), cursor=Cursor(0, 0, 20, 2))
    assert keys(lane, 1) == ["0/0"]


def test_a_failed_read_is_tried_again_and_never_passed_over() -> None:
    lane = make_lane(Counted(3, fails_at="0/1"))
    assert keys(lane, 1) == ["0/0"]
    for _ in range(2):
        with pytest.raises(OSError, match="disk on fire"):
            next(lane)


def test_closing_a_lane_closes_its_shard_and_loses_nothing() -> None:
    source = Counted(3)
    lane = make_lane(source)
    assert keys(lane, 1) == ["0/0"]
    lane.close()
    lane.close()
    assert source.num_closed == 1
    assert keys(lane, 2) == ["0/1", "0/2"]
