"""Blocks are the same for any number of workers, from any cursor, and leave nothing behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.multiprocessing
from support import block_readers as readers
from support.leaks import children, no_leaks, stop_helpers
from support.shards import write_shards

from jest_stream.errors import ConfigError
from jest_stream.sources.iterable import IterableSource
from jest_stream.sources.reader import Block, BlockReader
from jest_stream.sources.tar import TarSource
from jest_stream.types import Cursor, Example, Source
from jest_stream.views.decode import Decoded

__all__ = ["no_leaks"]
pytestmark = pytest.mark.usefixtures("no_leaks")

LANES = 5  # neither 2 nor 3 workers divide them evenly


def prepare(example: Example) -> dict[str, Any]:
    """Decodes, and draws from every global generator, as random transforms do."""
    decoded = Decoded(example)
    return {
        "key": example["__key__"],
        "image": torch.from_numpy(np.array(decoded["jpg"])),
        "draw": (float(torch.rand(())), random.random(), float(np.random.rand())),
    }


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "key": [row["key"] for row in rows],
        "image": torch.stack([row["image"] for row in rows]),
        "draw": [row["draw"] for row in rows],
    }


def start(lanes: int = LANES, epoch: int = 0) -> dict[int, Cursor]:
    return {lane: Cursor(epoch, 0, 0, 0) for lane in range(lanes)}


open_reader = partial(
    readers.open_reader,
    num_lanes=LANES,
    seed=7,
    block_size=4,
    prepare=prepare,
    collate=collate,
)


def read_all(reader: BlockReader) -> list[Block]:
    return list(iter(reader.read, None))


def content(block: Block) -> tuple[Any, ...]:
    """Returns a block as values that can be compared."""
    items = block.items or {"key": [], "draw": [], "image": torch.zeros(0)}
    values = (items["key"], items["draw"], items["image"].tolist())
    return (block.lane, *values, list(block.cursors), list(block.skipped), block.is_end)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TarSource:
    """11 shards of 9 examples: lanes of 3, 2, 2, 2, 2 shards."""
    folder = tmp_path_factory.mktemp("shards")
    return TarSource(write_shards(folder, num_shards=11, examples_per_shard=9, size=8))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 9])
def test_blocks_are_the_same_for_any_number_of_workers(source: Source, num_workers: int) -> None:
    expected = [content(block) for block in read_all(open_reader(source))]
    blocks = read_all(open_reader(source, num_workers=num_workers))
    assert [content(block) for block in blocks] == expected


def test_lanes_take_turns_until_they_end_and_every_example_comes_once(source: Source) -> None:
    blocks = read_all(open_reader(source))
    # 18 examples of a lane are 5 blocks, the last of 2; 27 of lane 0 are 7, the last of 3.
    assert [block.lane for block in blocks] == [0, 1, 2, 3, 4] * 5 + [0, 0]
    assert [block.num_examples for block in blocks] == [4] * 20 + [4, 2, 2, 2, 2, 4, 3]
    assert [block.is_end for block in blocks] == [False] * 21 + [True] * 4 + [False, True]
    keys = [key for block in blocks for key in block.items["key"]]
    assert sorted(keys) == [f"{index:06d}" for index in range(99)]


def test_a_lane_that_ends_with_a_full_block_ends_with_an_empty_one(source: Source) -> None:
    blocks = read_all(open_reader(source, block_size=9, cursors={1: Cursor(0, 0, 0, 0)}))
    assert [block.num_examples for block in blocks] == [9, 9, 0]
    assert blocks[-1].items is None
    assert blocks[-1].is_end


@pytest.mark.parametrize("num_workers", [0, 2])
def test_endless_lanes_reshuffle_and_draw_anew_in_every_epoch(
    source: Source, num_workers: int
) -> None:
    reader = open_reader(source, end_epoch=None, num_workers=num_workers, block_size=9)
    blocks = [reader.read() for _ in range(40)]
    reader.close()
    lane = [block.items for block in blocks if block is not None and block.lane == 1]
    first, second = lane[:2], lane[2:4]
    assert sorted(k for b in first for k in b["key"]) == sorted(k for b in second for k in b["key"])
    assert {d for b in first for d in b["draw"]}.isdisjoint(d for b in second for d in b["draw"])


def per_lane(blocks: list[Block]) -> dict[int, list[Any]]:
    """Returns what each lane gave, example by example, with the cursors."""
    lanes: dict[int, list[Any]] = {lane: [] for lane in range(LANES)}
    for block in blocks:
        if block.items is not None:
            rows = zip(block.items["key"], block.items["draw"], block.cursors, strict=True)
            lanes[block.lane].extend(rows)
    return lanes


def test_resuming_from_every_cursor_gives_the_tail(source: Source) -> None:
    whole = per_lane(read_all(open_reader(source, end_epoch=2)))
    for position in range(-1, 54):
        cursors = {
            lane: rows[min(position, len(rows) - 1)][2] if position >= 0 else Cursor(0, 0, 0, 0)
            for lane, rows in whole.items()
        }
        resumed = per_lane(read_all(open_reader(source, cursors=cursors, end_epoch=2)))
        assert resumed == {lane: rows[position + 1 :] for lane, rows in whole.items()}


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_resuming_in_workers_gives_the_tail(source: Source, num_workers: int) -> None:
    whole = per_lane(read_all(open_reader(source, end_epoch=2)))
    cursors = {lane: rows[5 + 3 * lane][2] for lane, rows in whole.items()}
    reader = open_reader(source, cursors=cursors, end_epoch=2, num_workers=num_workers)
    resumed = per_lane(read_all(reader))
    assert resumed == {lane: rows[6 + 3 * lane :] for lane, rows in whole.items()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_closing_between_any_two_blocks_changes_nothing(source: Source, num_workers: int) -> None:
    expected = [content(block) for block in read_all(open_reader(source))]
    reader = open_reader(source, num_workers=num_workers)
    blocks = []
    while (block := reader.read()) is not None:
        blocks.append(content(block))
        if len(blocks) % 4 == 1 or num_workers == 0:
            reader.close()
            reader.close()
            assert children() == []
    assert blocks == expected
    assert reader.read() is None


def test_cursors_lie_after_the_last_block_of_each_lane(source: Source) -> None:
    reader = open_reader(source, num_workers=2)
    assert reader.cursors == start()
    blocks = [reader.read() for _ in range(7)]
    reader.close()
    expected = start()
    expected.update({block.lane: block.cursors[-1] for block in blocks if block})
    assert reader.cursors == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_users_random_state_is_left_alone(source: Source, num_workers: int) -> None:
    def draw() -> tuple[float, ...]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = [draw() for _ in range(6)]
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    reader = open_reader(source, num_workers=num_workers)
    drawn = []
    for _ in range(6):
        reader.read()
        drawn.append(draw())
    reader.close()
    assert drawn == expected


def test_what_is_drawn_depends_on_the_seed_and_not_on_block_sizes(source: Source) -> None:
    def draws(**changes: Any) -> list[Any]:
        return [row[:2] for row in per_lane(read_all(open_reader(source, **changes)))[3]]

    assert draws() == draws(block_size=7)
    assert [draw for _, draw in draws()] != [draw for _, draw in draws(seed=8)]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_start_method_gives_the_same_blocks(source: Source, method: str) -> None:
    expected = [content(block) for block in read_all(open_reader(source))]
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        reader = open_reader(source, num_workers=1)
        assert [content(block) for block in read_all(reader)] == expected
        with pytest.raises(ConfigError, match=f"start method '{method}' .* num_workers=0"):
            open_reader(source, num_workers=1, prepare=lambda example: example).read()
    finally:
        torch.multiprocessing.set_start_method(before, force=True)
        stop_helpers()


def rows_of_every_kind(example: Example) -> dict[str, Any]:
    torch.manual_seed(int(example["__key__"]))
    return {
        "large": torch.rand(300, 1000),
        "half": torch.rand(3).bfloat16(),
        "tokens": {"ids": torch.randint(9, (5,)), "empty": torch.zeros(0)},
        "bytes": ("jpg", example["jpg"]),
        "tuple": (torch.ones(2), "x"),
        "complex": torch.tensor([1 + 2j]).conj(),
        "sparse": torch.eye(2).to_sparse(),
        "csr": torch.eye(2).to_sparse_csr(),
        "csc": torch.eye(2).to_sparse_csc(),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
    }


def list_of(rows: list[Any]) -> Any:
    return {"large": torch.stack([row["large"] for row in rows]), "rows": rows}


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
def test_tensors_of_every_kind_arrive_whole_and_hold_no_descriptor(source: Source) -> None:
    """Large ones come through shared memory, where each would hold one while it lives."""
    settings: dict[str, Any] = {"prepare": rows_of_every_kind, "collate": list_of}
    expected = read_all(open_reader(source, **settings))
    reader = open_reader(source, num_workers=2, **settings)
    num_fds = []
    blocks = []
    while (block := reader.read()) is not None:
        blocks.append(block)
        num_fds.append(psutil.Process().num_fds())
    assert max(num_fds) - min(num_fds) <= 1
    for ours, theirs in zip(blocks, expected, strict=True):
        if theirs.items is None:
            assert ours.items is None
            continue
        assert torch.equal(ours.items["large"], theirs.items["large"])
        assert not ours.items["large"].is_shared()
        for row, other in zip(ours.items["rows"], theirs.items["rows"], strict=True):
            assert row["bytes"] == other["bytes"]
            assert row["tuple"][1] == "x" and torch.equal(row["tuple"][0], torch.ones(2))
            assert torch.equal(row["half"], other["half"])
            assert row["half"].dtype == torch.bfloat16
            assert torch.equal(row["tokens"]["ids"], other["tokens"]["ids"])
            row["tokens"]["ids"].add_(1)  # writable, and nobody else's
            assert row["tokens"]["empty"].shape == (0,)
            for name in ("complex", "sparse", "csr", "csc", "transposed"):
                assert torch.equal(row[name].to_dense(), other[name].to_dense()), name
                assert row[name].layout == other[name].layout
    kept = torch._utils._sparse_tensors_to_validate
    assert not kept, "torch holds the sparse tensors that arrived, for its next torch.load"


@pytest.mark.parametrize("make", [list, iter])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_iterable_is_read_in_workers_too(make: Callable[[Any], Any], num_workers: int) -> None:
    source = IterableSource(make([{"text": str(index)} for index in range(10)]))
    reader = open_reader(
        source,
        num_lanes=1,
        num_workers=num_workers,
        prepare=lambda example: example["text"],
        collate=list,
    )
    texts = []
    while (block := reader.read()) is not None:
        texts += block.items or []
        reader.close()  # an iterator goes on where it was
    assert texts == [str(index) for index in range(10)]


def test_workers_read_ahead_while_nobody_asks(tmp_path: Path, source: Source) -> None:
    """One turn over the lanes, and no further: the blocks that wait are bounded."""

    def note(example: Example) -> str:
        (tmp_path / example["__key__"]).touch()
        return example["__key__"]

    reader = open_reader(
        source, num_workers=1, prepare=note, collate=list, block_size=2, end_epoch=None
    )
    assert reader.read() is not None
    ahead = 2 * (1 + LANES + 1)  # the block taken, those that wait, the one being held back
    pause, deadline = threading.Event(), time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < ahead and time.monotonic() < deadline:
        pause.wait(0.01)
    pause.wait(0.2)  # in which it could overrun
    assert len(list(tmp_path.iterdir())) == ahead
    reader.close()


@pytest.mark.parametrize(
    ("max_ahead_bytes", "num_waiting"),
    [(3 << 20, 3), (1, 1), (1 << 40, LANES)],
    ids=["three blocks", "less than one", "no limit"],
)
def test_what_waits_is_bounded_in_bytes_too(
    tmp_path: Path, source: Source, max_ahead_bytes: int, num_waiting: int
) -> None:
    """Blocks of 0.9 MB. One may always wait, or nothing would ever arrive."""

    def note(example: Example) -> torch.Tensor:
        (tmp_path / example["__key__"]).touch()
        return torch.zeros(900_000, dtype=torch.uint8)

    reader = open_reader(
        source,
        num_workers=1,
        prepare=note,
        collate=list,
        block_size=1,
        end_epoch=None,
        max_ahead_bytes=max_ahead_bytes,
    )
    assert reader.read() is not None
    ahead = 1 + num_waiting + 1  # the block taken, those that wait, the one being held back
    pause, deadline = threading.Event(), time.monotonic() + 20
    while len(list(tmp_path.iterdir())) < ahead and time.monotonic() < deadline:
        pause.wait(0.01)
    pause.wait(0.2)  # in which it could overrun
    assert len(list(tmp_path.iterdir())) == ahead
    reader.close()


@pytest.mark.parametrize("max_ahead_bytes", [1, 10_000])
def test_the_limit_of_bytes_changes_no_block(source: Source, max_ahead_bytes: int) -> None:
    expected = [content(block) for block in read_all(open_reader(source))]
    reader = open_reader(source, num_workers=3, max_ahead_bytes=max_ahead_bytes)
    assert [content(block) for block in read_all(reader)] == expected


@pytest.mark.parametrize("num_bytes", [0, 1, 65_000, 66_000, 5_000_000])
def test_blocks_of_every_size_arrive_whole(source: Source, num_bytes: int) -> None:
    def prepare(example: Example) -> Any:
        generator = np.random.default_rng(int(example["__key__"]))
        data = generator.integers(256, size=num_bytes, dtype=np.uint8)
        return data.tobytes() + b"!", torch.from_numpy(data)

    settings: dict[str, Any] = {"prepare": prepare, "collate": list, "block_size": 1}
    expected = open_reader(source, **settings)
    reader = open_reader(source, num_workers=2, **settings)
    for _ in range(20):
        ours, theirs = reader.read(), expected.read()
        assert ours is not None and theirs is not None
        assert ours.items[0][0] == theirs.items[0][0]
        assert torch.equal(ours.items[0][1], theirs.items[0][1])
    reader.close()
    expected.close()


def test_repr_shows_the_live_state(source: Source) -> None:
    reader = open_reader(source, num_workers=2)
    assert repr(reader) == "<BlockReader 5 lanes | 0 worker processes>"
    reader.read()
    assert repr(reader) == "<BlockReader 5 lanes | 2 worker processes>"
    reader.close()
