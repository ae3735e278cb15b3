"""A checkpoint holds the place of a run as json, by lane and rank, and is dealt to any ranks.

pytest tests/pipeline/test_run_state.py
"""

from __future__ import annotations

import copy
import io
import json
from itertools import islice
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower
from support.pairs import Pairs

from jest_stream import JESTDataset
from jest_stream.config.sizes import Layout
from jest_stream.errors import ResumeMismatchError
from jest_stream.pipeline.state import (
    RunState,
    checkpoint_of,
    counters_of,
    layout_to_resume,
    merge_states,
    position_of,
    read_record,
    record_of,
    run_of,
    upgraded,
)
from jest_stream.pipeline.super_batches import Position
from jest_stream.types import Cursor, Selection

pytestmark = pytest.mark.usefixtures("no_leaks")


def settings_of(world_size: int) -> dict[str, Any]:
    """Settings of the same global batch on any number of ranks."""
    return {
        "source": "numbers",
        "seed": 3,
        "lanes": 6,
        "lookahead": 1,
        "world_size": world_size,
        "batch_size": 12 // world_size,
        "super_batch_size": [[0, 24 // world_size], [5, 36 // world_size]],
    }


def selection() -> Selection:
    return Selection(
        indices=torch.tensor([3, 0]),
        weights=torch.tensor([0.1, 1.9]),
        effective_support=torch.tensor([2.5], dtype=torch.float64),
        selected_score=torch.tensor(0.7),
        candidate_score=torch.tensor(float("-inf")),
        group_counts=torch.zeros(0, dtype=torch.int64),
        quota_excess=torch.tensor([1]),
        is_finite=torch.tensor(True),
    )


def layout_of(rank: int, world_size: int) -> Layout:
    return Layout(num_lanes=6, rank=rank, world_size=world_size)


def checkpoint_on(rank: int, world_size: int, *, next_lane: int = 1) -> dict[str, Any]:
    """The checkpoint of a rank after 7 steps, with one super-batch in flight."""
    layout = layout_of(rank, world_size)
    run = RunState(step=7, epoch=1, epoch_step=2, epoch_batches=9)
    run.to_restore = [record_of(8, 6, selection())]
    return checkpoint_of(
        run,
        Position({lane: Cursor(1, lane, 100 * lane, 5) for lane in layout.lanes}, next_lane),
        settings=settings_of(world_size),
        layout=layout,
        counters={"steps": 7, "samples_read": 10 + rank},
    )


def test_a_checkpoint_gives_back_the_run_the_position_and_the_counters() -> None:
    checkpoint = checkpoint_on(0, 1)
    layout = layout_to_resume(checkpoint, settings_of(1), rank=0)
    assert layout == layout_of(0, 1)
    run = run_of(checkpoint, layout)
    assert (run.step, run.epoch, run.epoch_step, run.epoch_batches) == (7, 1, 2, 9)
    assert run.is_resumed and run.has_begun and not run.in_flight
    position, counters = position_of(checkpoint, layout), counters_of(checkpoint, layout)
    assert position == Position({lane: Cursor(1, lane, 100 * lane, 5) for lane in range(6)}, 1)
    assert counters == {"steps": 7, "samples_read": 10}
    again = checkpoint_of(run, position, settings=settings_of(1), layout=layout, counters=counters)
    assert again == checkpoint


def test_json_and_weights_only_read_a_checkpoint_back() -> None:
    checkpoint, file = checkpoint_on(0, 1), io.BytesIO()
    assert json.loads(json.dumps(checkpoint)) == checkpoint
    torch.save(checkpoint, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == checkpoint


def test_a_record_keeps_a_selection_bit_for_bit() -> None:
    size, weights_step, found = read_record(json.loads(json.dumps(record_of(8, None, selection()))))
    assert (size, weights_step) == (8, None)
    for name in Selection.__dataclass_fields__:
        one, other = getattr(found, name), getattr(selection(), name)
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_a_copy_of_a_run_does_not_change_with_it() -> None:
    run = RunState(step=3, to_restore=[record_of(8, 6, selection())])
    before = run.copy()
    run.step += 1
    run.to_restore.clear()
    run.in_flight.append(None)  # type: ignore[arg-type]
    assert before.step == 3 and len(before.to_restore) == 1 and not before.in_flight


def test_merged_ranks_are_dealt_to_the_same_ranks_as_they_were() -> None:
    states = [checkpoint_on(rank, 3) for rank in range(3)]
    merged = merge_states(states[::-1])
    assert list(merged["lanes"]) == ["0", "1", "2", "3", "4", "5"]
    for rank, state in enumerate(states):
        layout = layout_to_resume(merged, settings_of(3), rank=rank)
        assert run_of(merged, layout) == run_of(state, layout)
        assert position_of(merged, layout) == position_of(state, layout)
        assert counters_of(merged, layout) == counters_of(state, layout)


@pytest.mark.parametrize("world_size", [1, 2])
def test_merged_ranks_are_dealt_to_others_without_their_selections(world_size: int) -> None:
    """Three ranks of two lanes, each with its first lane's turn over: lanes 0, 1 and 2 of six."""
    merged = merge_states([checkpoint_on(rank, 3) for rank in range(3)])
    layouts = [layout_to_resume(merged, settings_of(world_size), r) for r in range(world_size)]
    for layout in layouts:
        run = run_of(merged, layout)
        assert (run.step, run.epoch_batches, run.to_restore) == (7, None, [])
    positions = [position_of(merged, layout) for layout in layouts]
    cursors = {lane: each for position in positions for lane, each in position.cursors.items()}
    assert cursors == {lane: Cursor(1, lane, 100 * lane, 5) for lane in range(6)}
    #     turns of one rank: 1 1 1 0 0 0; of two: 1 1 0 (lanes 0, 2, 4) and 1 0 0 (lanes 1, 3, 5)
    assert [each.next_lane for each in positions] == ([3] if world_size == 1 else [2, 1])
    counters = [counters_of(merged, layout) for layout in layouts]
    assert sum(each["samples_read"] for each in counters) == 10 + 11 + 12
    assert all(each["steps"] == 7 for each in counters)


def test_a_state_of_another_rank_is_refused() -> None:
    with pytest.raises(ResumeMismatchError, match="is of rank 1 of 3 .*this is rank 0 of 3"):
        layout_to_resume(checkpoint_on(1, 3), settings_of(3), rank=0)


def test_settings_that_were_left_open_take_the_checkpoints() -> None:
    open_settings = {**settings_of(1), "lanes": None, "lookahead": None}
    assert layout_to_resume(checkpoint_on(0, 1), open_settings, rank=0).num_lanes == 6
    with pytest.raises(ResumeMismatchError, match="seed=3, this dataset has seed=4"):
        layout_to_resume(checkpoint_on(0, 1), {**open_settings, "seed": 4}, rank=0)


@pytest.mark.parametrize("version", [1, 4, None])
def test_an_older_or_newer_format_is_refused_in_words(version: int | None) -> None:
    state = {**checkpoint_on(0, 1), "version": version}
    message = f"format version {version}, this release reads 2 and 3. Resume with the release"
    with pytest.raises(ResumeMismatchError, match=message):
        upgraded(state)


# Taken by commit 735ea8b after three batches of the dataset below: `layout` held the settings.
VERSION_2 = """
{"version": 2, "layout": {"source": "pairs [5, 4, 6, 5]", "num_shards": 4, "seed": 0, "lanes": 4,
"world_size": 1, "batch_size": 2, "super_batch_size": [[0, 4]], "lookahead": 1, "repeat": true,
"quotas": []}, "step": 3, "epoch": 0, "epoch_step": 3, "epoch_batches": null, "lanes":
{"0": [0, 0, 0, 3, 0], "1": [0, 0, 0, 3, 0], "2": [0, 0, 0, 3, 0], "3": [0, 0, 0, 3, 0]}, "ranks":
{"0": {"in_flight": [[4, 2, [["indices", "torch.int64", [3, 0]], ["weights", "torch.float32",
[1.0, 1.0]], ["effective_support", "torch.float32", [4.0, 3.0]], ["selected_score", "torch.float32",
1.5604963302612305], ["candidate_score", "torch.float32", 1.5604965686798096], ["group_counts",
"torch.int64", []], ["quota_excess", "torch.int64", []], ["is_finite", "torch.bool", true]]]],
"counters": [["steps", 3], ["samples_read", 12], ["samples_scored", 16], ["samples_trained", 6],
["epoch_tail", 0], ["epoch_abandoned", 0], ["super_batch_duplicates", 0]]}}, "learner_copy": null}
"""
BATCHES_OF_VERSION_2 = [["0-0", "2-0"], ["0-1", "3-1"], ["1-2", "0-2"], ["3-3", "0-3"]]


def dataset() -> JESTDataset:
    models = {"learner": TinyTwoTower(1), "reference": TinyTwoTower(2)}
    return JESTDataset(
        Pairs([5, 4, 6, 5]), batch_size=2, super_batch_size=4, as_dict=True, lookahead=1, **models
    )


def test_a_checkpoint_of_version_2_goes_on_where_it_was_taken() -> None:
    state = json.loads(VERSION_2)
    untouched = copy.deepcopy(state)
    whole = [batch["key"] for batch in islice(dataset(), 7)]
    assert whole[:4] == BATCHES_OF_VERSION_2
    with dataset() as resumed:
        resumed.load_state_dict(state)
        assert resumed.state_dict()["settings"] == state["layout"]
        assert [batch["key"] for batch in islice(resumed, 4)] == whole[3:]
        assert resumed.metrics()["samples_read"] == 12 + 4 * 4
    assert state == untouched
    assert merge_states([state])["version"] == 3
