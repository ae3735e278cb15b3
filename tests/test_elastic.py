"""Other ranks continue the same global stream: no candidate is lost, none comes twice.

pytest tests/test_elastic.py
"""

from __future__ import annotations

import copy
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
import torch.distributed.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor, tokenize
from support.pairs import Pairs, key_of, sizes_of, stream_config
from support.ranks import on_ranks

from jest_stream import JESTDataset, SelectionConfig, gather_state_dict
from jest_stream.config.sizes import Layout
from jest_stream.errors import ConfigError, ResumeMismatchError, StalledError
from jest_stream.metrics.metrics import Metrics
from jest_stream.pipeline.device.streams import Ring
from jest_stream.pipeline.state import (
    RunState,
    checkpoint_of,
    layout_to_resume,
    merge_states,
    position_of,
    run_of,
)
from jest_stream.pipeline.super_batches import Position, SuperBatchReader
from jest_stream.sources import open_source

pytestmark = pytest.mark.usefixtures("no_leaks")

UNIFORM = SelectionConfig(method="uniform")
GLOBAL_BATCH = 8


class Rank:
    """A rank of a simulated run: takes super-batches, and has a state."""

    def __init__(self, source: Pairs, layout: Layout, position: Position, step: int = 0) -> None:
        self.layout, self.step = layout, step
        sizes = sizes_of(1, 2 * len(layout.lanes))  # blocks of 2 examples
        self.reader = SuperBatchReader(
            stream_config(seed=3), sizes, source=open_source(source), layout=layout, prepare=key_of
        )
        self.reader.go_to(position)

    def take(self, size: int) -> list[str]:
        self.step += 1
        slot = Ring().slot()
        keys: list[str] = self.reader.read(size, slot=slot, end_epoch=None).columns["key"]
        return keys

    def state(self) -> dict[str, Any]:
        return checkpoint_of(
            RunState(step=self.step, epoch_step=self.step),
            self.reader.position,
            settings={"lanes": self.layout.num_lanes, "world_size": self.layout.world_size},
            layout=self.layout,
            counters={**Metrics().state_dict(), "steps": self.step},
        )


def ranks_of(source: Pairs, num_lanes: int, world_size: int, state: Any = None) -> list[Rank]:
    ranks = []
    for rank in range(world_size):
        layout = Layout(num_lanes=num_lanes, rank=rank, world_size=world_size)
        if state is None:
            ranks.append(Rank(source, layout, Position.of_epoch(0, layout.lanes)))
        else:
            step = run_of(state, layout).step
            ranks.append(Rank(source, layout, position_of(state, layout), step))
    return ranks


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_layouts_in_a_row_read_the_same_global_stream(data: st.DataObject) -> None:
    """Also where the super-batch is no multiple of the lanes, so that turns are in mid-round."""
    num_lanes = data.draw(st.sampled_from([2, 4, 6, 12]), "lanes")
    worlds = st.sampled_from([n for n in (1, 2, 3, 4, 6, 12) if num_lanes % n == 0])
    size = 12 * data.draw(st.integers(1, 2), "global super-batch / 12")
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=num_lanes, max_size=num_lanes + 3))
    source = Pairs(lengths)
    one = ranks_of(source, num_lanes, 1)[0]
    state = None
    for _ in range(data.draw(st.integers(1, 4), "resumes")):
        world_size = data.draw(worlds, "ranks")
        ranks = ranks_of(source, num_lanes, world_size, state)
        for _ in range(data.draw(st.integers(0, 3), "steps")):
            together = [key for rank in ranks for key in rank.take(size // world_size)]
            assert sorted(together) == sorted(one.take(size))
        shuffled = data.draw(st.permutations([rank.state() for rank in ranks]))
        state = json.loads(json.dumps(merge_states(shuffled)))


@given(turn=st.integers(0, 11), before=st.sampled_from([1, 2, 3]), after=st.sampled_from([1, 2, 3]))
def test_turns_are_kept_where_the_ranks_divide_them(turn: int, before: int, after: int) -> None:
    if turn % before or turn % after:
        return
    source = Pairs([9] * 12)
    ranks = ranks_of(source, 12, before)
    for rank in ranks:
        if turn:
            rank.take(turn // before)
        else:
            rank.step = 1
    state = merge_states([rank.state() for rank in ranks])
    for rank in range(after):
        layout = Layout(num_lanes=12, rank=rank, world_size=after)
        assert position_of(state, layout).next_lane == turn // after


def test_a_merge_needs_every_rank_at_the_same_moment() -> None:
    ranks = ranks_of(Pairs([4] * 4), 4, 2)
    states = [rank.state() for rank in ranks]
    assert merge_states(states) == merge_states(states[::-1])
    with pytest.raises(ResumeMismatchError, match="hold ranks 1, but the run has 2"):
        merge_states(states[1:])
    ranks[1].take(4)
    with pytest.raises(ResumeMismatchError, match="step is 0 and 1"):
        merge_states([states[0], ranks[1].state()])


SHARDS = {"num_shards": 8, "examples_per_shard": 15}


def jest(shards: Any, batch_size: int, **options: Any) -> JESTDataset:
    defaults = {"selection": UNIFORM, "filter_ratio": 0.5, "as_dict": True}
    return JESTDataset(
        shards,
        transform=to_tensor,
        tokenizer=tokenize,
        batch_size=batch_size,
        **{**defaults, **options},
    )


def together(world_size: int, folder: Path, work: Any, *arguments: Any) -> list[Any]:
    """Runs `work` on real ranks, or here if there is one; returns what each of them found."""
    if world_size == 1:
        return [work(1, folder, *arguments)]
    return on_ranks(world_size, folder, work, world_size, folder, *arguments)


def read_on(
    world_size: int, folder: Path, shards: list[str], state: Any, num_steps: int
) -> dict[str, Any]:
    """Continues the stream for some steps; returns its keys and the merged state after them."""
    with jest(shards, GLOBAL_BATCH // world_size) as dataset:
        if state is not None:
            dataset.load_state_dict(state)
        keys = [batch["key"] for batch in islice(dataset, num_steps)]
        counters = {name: dataset.metrics()[name] for name in ("steps", "samples_read")}
        merged = gather_state_dict(dataset, timeout_s=20)
        if num_steps == 3:  # once is enough
            check_dcp(folder / f"dcp-{world_size}", dataset)
    return {"keys": keys, "state": merged, "counters": counters}


def check_dcp(folder: Path, dataset: JESTDataset) -> None:
    """Torch's distributed checkpoint takes the dataset as it is."""
    torch.distributed.checkpoint.save({"data": dataset}, checkpoint_id=folder)


def steps_of(found: list[dict[str, Any]]) -> list[list[str]]:
    """The keys of each step over all ranks."""
    return [sorted(sum(step, [])) for step in zip(*(each["keys"] for each in found), strict=True)]


@pytest.mark.filterwarnings("ignore")  # of torch's checkpoints
@pytest.mark.timeout(240)
def test_one_two_and_four_ranks_continue_each_others_stream(
    shards: list[str], tmp_path: Path
) -> None:
    stream = jest(shards, GLOBAL_BATCH)
    expected = [sorted(batch["key"]) for batch in islice(stream, 16)]
    read, state = 0, None
    for world_size, num_steps in ((4, 3), (2, 4), (1, 5), (2, 4)):
        found = together(world_size, tmp_path, read_on, shards, state, num_steps)
        assert steps_of(found) == expected[read : read + num_steps]
        read += num_steps
        state = found[0]["state"]
        assert len({str(each["state"]) for each in found}) == 1
        assert {each["counters"]["steps"] for each in found} == {read}
        assert sum(each["counters"]["samples_read"] for each in found) == read * GLOBAL_BATCH
    one = jest(shards, GLOBAL_BATCH)  # loads torch's checkpoint of four ranks on one
    torch.distributed.checkpoint.load({"data": one}, checkpoint_id=tmp_path / "dcp-4", no_dist=True)
    assert sorted(next(iter(one))["key"]) == expected[3]


def choose_on(shards: list[str], state: Any) -> dict[str, Any]:
    """Chooses jointly with super-batches in flight; ends with what must be refused."""
    rank = torch.distributed.get_rank()
    models = {"learner": TinyTwoTower(1), "reference": TinyTwoTower(2)}
    with jest(shards, 4, selection=SelectionConfig(), lookahead=2, **models) as dataset:
        if state is None:
            list(islice(dataset, 3))
        else:
            dataset.load_state_dict(state)
        own = dataset.state_dict()
        merged = gather_state_dict(dataset, include_learner_copy=True, timeout_s=20)
        keys = [batch["key"] for batch in islice(dataset, 3)]
        states: list[Any] = [None, None]
        torch.distributed.all_gather_object(states, own)
        with pytest.raises(ResumeMismatchError, match="Load on each rank the state that it saved"):
            dataset.load_state_dict(states[1 - rank])
        if rank == 0:
            started = time.monotonic()
            with pytest.raises(StalledError, match="rank 0 of 2 got no answer.*timeout_s=1 s"):
                gather_state_dict(dataset, timeout_s=1)
            assert time.monotonic() - started < 20
    return {"own": own, "merged": merged, "keys": keys}


@pytest.mark.timeout(120)
def test_two_ranks_resume_their_choices_from_their_own_or_the_merged_state(
    shards: list[str], tmp_path: Path
) -> None:
    first = on_ranks(2, tmp_path, choose_on, shards, None)
    again = on_ranks(2, tmp_path, choose_on, shards, first[0]["merged"])
    assert [each["keys"] for each in again] == [each["keys"] for each in first]
    assert first[0]["merged"]["learner_copy"] is not None
    for rank in range(2):
        assert str(again[rank]["own"]) == str(first[rank]["own"])
    one = jest(
        shards,
        8,
        selection=SelectionConfig(),
        lookahead=2,
        learner=TinyTwoTower(1),
        reference=TinyTwoTower(2),
    )
    one.load_state_dict(first[0]["merged"])
    # Read and chosen from anew: from the same candidates, by other draws.
    candidates = jest(shards, 16)
    wanted = list(islice(candidates, 6))[3:]
    for batch, among in zip(one, wanted, strict=False):
        assert set(batch["key"]) <= set(among["key"])
    with pytest.raises(ResumeMismatchError, match="gather_state_dict"):
        one.load_state_dict(first[0]["own"])


def saved(shards: list[str], **options: Any) -> dict[str, Any]:
    """The merged state of two ranks with batches of 4, without starting them."""
    state = copy.deepcopy(jest(shards, 8, **options).state_dict())
    state["settings"].update(world_size=2, batch_size=4, super_batch_size=[[0, 4]])
    state["ranks"]["1"] = copy.deepcopy(state["ranks"]["0"])
    return state


@pytest.mark.parametrize(
    ("batch_size", "options", "message"),
    [
        (4, {}, r"batch_size=4 on each of 2 ranks, 8 in all; .*batch_size=4 on each of 1, 4 in"),
        (8, {"super_batch_size": 16}, r"super_batch_size=\[\[0, 4\]\] on each of 2 ranks"),
        (8, {"seed": 1}, "seed=0, this dataset has seed=1"),
        (8, {"lanes": 4}, "lanes=8, this dataset has lanes=4"),
    ],
)
def test_another_global_batch_is_refused_with_both_values(
    shards: list[str], batch_size: int, options: dict[str, Any], message: str
) -> None:
    state = saved(shards)
    with pytest.raises(ResumeMismatchError, match=message):
        jest(shards, batch_size, **options).load_state_dict(state)
    jest(shards, 8).load_state_dict(state)


def test_the_lanes_are_those_of_the_checkpoint(shards: list[str]) -> None:
    few = jest(shards, 8, lanes=2)
    expected = [batch["key"] for batch in islice(few, 5)]
    few = jest(shards, 8, lanes=2)
    list(islice(few, 2))
    resumed = jest(shards, 8)
    resumed.load_state_dict(few.state_dict())
    assert [batch["key"] for batch in islice(resumed, 3)] == expected[2:]
    assert resumed.state_dict()["settings"]["lanes"] == 2


def test_lanes_that_the_ranks_cannot_share_are_refused(shards: list[str]) -> None:
    state = saved(shards)
    state["settings"]["lanes"] = 7
    with pytest.raises(ResumeMismatchError, match="lanes=7 on 2 ranks, which 2 ranks cannot"):
        merged_on_two(state, shards)


def merged_on_two(state: dict[str, Any], shards: list[str]) -> None:
    layout_to_resume(state, {**state["settings"], "lanes": None}, rank=0)


def test_a_time_limit_that_is_none_is_refused(shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="timeout_s must be above 0"):
        gather_state_dict(jest(shards, 4), timeout_s=0)


def test_without_ranks_the_gathered_state_is_the_local_one(shards: list[str]) -> None:
    dataset = jest(shards, 4)
    list(islice(dataset, 2))
    assert str(gather_state_dict(dataset)) == str(dataset.state_dict())
