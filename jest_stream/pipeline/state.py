"""Keeps the progress of a run, and makes checkpoints: merged over ranks, dealt to any number.

`RunState` changes as batches are handed out; the functions turn it into a checkpoint and back. A
checkpoint is made of plain dicts, lists, strings and numbers, which `torch.load(weights_only=True)`
and even json read back. Its entries are keyed by lane and by rank: checkpoints of several ranks
merge by uniting these, and a rank of another layout takes the lanes that it reads. All values below
these keys are lists, which `torch.distributed.checkpoint` keeps whole. Runs in the training thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from jest_stream.config import Layout
from jest_stream.errors import ResumeMismatchError
from jest_stream.metrics import shared_out
from jest_stream.pipeline.super_batches import Position, ScoredSuperBatch, SuperBatch
from jest_stream.types import Cursor, Selection

VERSION = 3

_SHARED = ("step", "epoch", "epoch_step", "epoch_batches")  # of `RunState`: equal on all ranks
_PER_RANK = ("batch_size", "super_batch_size")  # the product with the number of ranks must match
_DTYPES = {
    str(t): t for t in (torch.int64, torch.float16, torch.float32, torch.float64, torch.bool)
}

Record = list[Any]
"""A super-batch in flight as a checkpoint holds it: its size, the step of the weights that scored
it, and its selection, which other weights would make otherwise. See `record_of`."""


@dataclass
class RunState:
    """All of a run that changes as batches are handed out, but for the reader's position."""

    step: int = 0
    """Batches handed out."""
    epoch: int = 0
    """Passes begun before this one, where `repeat=False`."""
    epoch_step: int = 0
    """Batches handed out in this epoch; 0 again as soon as it is complete, where its length is
    known before."""
    epoch_batches: int | None = None
    """Batches of this pass, where that was computed beforehand."""
    in_flight: deque[ScoredSuperBatch] = field(default_factory=deque)
    """Super-batches that are selected from and not handed out, the next one first."""
    to_restore: list[Record] = field(default_factory=list)
    """Super-batches that a checkpoint had in flight, still to be read; they follow `in_flight`."""
    tail: SuperBatch | None = None
    """The candidates left where a pass has ended, too few for a batch; None before."""
    is_resumed: bool = False
    """Whether a checkpoint was loaded and nothing handed out since."""
    has_begun: bool = False
    """Whether a batch was handed out or a checkpoint loaded."""

    def copy(self) -> RunState:
        """Returns the same state, which does not change with this one."""
        return replace(self, in_flight=self.in_flight.copy(), to_restore=self.to_restore.copy())


def record_of(size: int, weights_step: int | None, selection: Selection) -> Record:
    """Returns the record of a super-batch in flight; the selection lies on the CPU."""
    columns = []
    for each in fields(Selection):
        tensor = getattr(selection, each.name)
        columns.append([each.name, str(tensor.dtype), tensor.tolist()])
    return [size, weights_step, columns]


def read_record(record: Record) -> tuple[int, int | None, Selection]:
    """Returns the arguments of `record_of`."""
    size, weights_step, columns = record
    tensors = {name: torch.tensor(values, dtype=_DTYPES[dtype]) for name, dtype, values in columns}
    return size, weights_step, Selection(**tensors)


def checkpoint_of(
    run: RunState,
    position: Position,
    *,
    settings: Mapping[str, Any],
    layout: Layout,
    counters: Mapping[str, int],
    learner_copy: Any = None,
) -> dict[str, Any]:
    """Returns the checkpoint of one rank.

    Args:
      run: where it is.
      position: the place where reading goes on, after all super-batches in flight.
      settings: the settings that must match on load, by name; with `lanes` and `world_size`.
      layout: names the rank and its lanes.
      counters: as `Metrics.state_dict` gives them.
      learner_copy: weights to keep with it, or None.
    """
    in_flight = [
        record_of(scored.super_batch.size, scored.weights_step, scored.selection.on_host())
        for scored in run.in_flight
    ]
    # Super-batches in flight are not saved: reading goes on at the first of them, and each record
    # holds its selection.
    if run.in_flight:
        position = run.in_flight[0].super_batch.position
    return {
        "version": VERSION,
        "settings": dict(settings),
        **{name: getattr(run, name) for name in _SHARED},
        # Per lane its cursor, and 1 if it has had its turn in the round at hand. With lanes 0, 2, 4
        # and `next_lane` 1 the turns are 1, 0, 0.
        "lanes": {
            str(lane): [*position.cursors[lane], int(turn < position.next_lane)]
            for turn, lane in enumerate(layout.lanes)
        },
        "ranks": {
            str(layout.rank): {
                "in_flight": [*in_flight, *run.to_restore],
                "counters": [list(item) for item in counters.items()],
            }
        },
        "learner_copy": learner_copy,
    }


def upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a checkpoint in the present format.

    Raises:
      ResumeMismatchError: for a version that this release cannot read.
    """
    if state.get("version") == VERSION:
        return state
    if state.get("version") == 2:  # the settings had another name
        rest = {name: value for name, value in state.items() if name != "layout"}
        return {**rest, "version": VERSION, "settings": state["layout"]}
    raise ResumeMismatchError(
        f"the checkpoint has format version {state.get('version')}, this release reads 2 and "
        f"{VERSION}. Resume with the release that wrote it."
    )


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one checkpoint of all ranks, which any layout can load.

    Args:
      states: of every rank, in any order, taken after the same step. The learner copy of the first
        is kept: the ranks of a data-parallel run hold the same weights.

    Raises:
      ResumeMismatchError: if they are not of one moment of one run, or one is missing.
    """
    states = [upgraded(state) for state in states]
    first = states[0]
    for other in states:
        for name in ("settings", *_SHARED):
            if other[name] != first[name]:
                raise ResumeMismatchError(
                    f"the states of ranks {', '.join(first['ranks'])} and "
                    f"{', '.join(other['ranks'])} are not of the same moment: {name} is "
                    f"{first[name]!r} and {other[name]!r}. Take them on all ranks after the same "
                    f"step."
                )
    merged = {
        **first,
        "lanes": _united(state["lanes"] for state in states),
        "ranks": _united(state["ranks"] for state in states),
    }
    world_size, num_lanes = first["settings"]["world_size"], first["settings"]["lanes"]
    for name, wanted in (("ranks", world_size), ("lanes", num_lanes)):
        if len(merged[name]) != wanted:
            raise ResumeMismatchError(
                f"the states hold {name} {', '.join(merged[name])}, but the run has {wanted}. "
                f"Merge the states of all {world_size} ranks."
            )
    return merged


def layout_to_resume(state: Mapping[str, Any], settings: Mapping[str, Any], rank: int) -> Layout:
    """Returns the lanes of a checkpoint over the present ranks, if this rank may continue it.

    Args:
      state: the checkpoint of a rank, or the merged one; in the present format.
      settings: those of the dataset that loads; `lanes` and `lookahead` are None where the user
        left them open.
      rank: this process's.

    Raises:
      ResumeMismatchError: if it was taken under other settings, naming both values; or if it lacks
        lanes or super-batches of this rank.
    """
    saved, world_size = state["settings"], settings["world_size"]
    for name, value in settings.items():
        # There are three kinds of settings:
        # 1. Free ones: the number of ranks may change, and these two if they were left open.
        if name == "world_size" or (name in ("lanes", "lookahead") and value is None):
            continue
        # 2. Sizes per rank: on other ranks their total must be the same.
        if name in _PER_RANK and saved["world_size"] != world_size:
            _require_same_total(name, saved, settings)
        # 3. All others must be equal.
        elif saved[name] != value:
            hint = ""
            if name == "source":  # named by a hash, from which nobody can tell the difference
                hint = (
                    f"The shards, {saved['num_shards']} then and {settings['num_shards']} now, "
                    f"differ in name or order. "
                )
            raise ResumeMismatchError(
                f"the checkpoint was taken with {name}={saved[name]!r}, this dataset has "
                f"{name}={value!r}. {hint}Resume with the former value, or start a new run."
            )
    if saved["lanes"] % world_size:
        raise ResumeMismatchError(
            f"the checkpoint was taken with lanes={saved['lanes']} on {saved['world_size']} ranks, "
            f"which {world_size} ranks cannot share out evenly. Resume on a number of ranks that "
            f"divides {saved['lanes']}."
        )
    # The same ranks restore their super-batches in flight, so each needs its entry. Other ranks
    # need their lanes only.
    layout = Layout(num_lanes=saved["lanes"], rank=rank, world_size=world_size)
    needed, found = [str(lane) for lane in layout.lanes], state["lanes"]
    has_rank = str(rank) in state["ranks"] or not _is_same_world(state, layout)
    if not has_rank or not found.keys() >= set(needed):
        raise ResumeMismatchError(
            f"the checkpoint is of rank {', '.join(state['ranks'])} of {saved['world_size']} and "
            f"of lanes {', '.join(found)}; this is rank {rank} of {world_size}, which reads lanes "
            f"{', '.join(needed)}. Load on each rank the state that it saved, or on all the one "
            f"that gather_state_dict made."
        )
    return layout


def run_of(state: Mapping[str, Any], layout: Layout) -> RunState:
    """Returns the progress of a rank that continues a checkpoint.

    On the same number of ranks, each restores the super-batches that it had in flight. Otherwise
    these are read and selected from anew, and the pass may end elsewhere.

    Args:
      state: the checkpoint, in the present format.
      layout: the result of `layout_to_resume`.
    """
    is_same_world = _is_same_world(state, layout)
    return RunState(
        step=state["step"],
        epoch=state["epoch"],
        epoch_step=state["epoch_step"],
        epoch_batches=state["epoch_batches"] if is_same_world else None,
        to_restore=list(state["ranks"][str(layout.rank)]["in_flight"]) if is_same_world else [],
        is_resumed=True,
        has_begun=True,
    )


def position_of(state: Mapping[str, Any], layout: Layout) -> Position:
    """Returns the place where a rank that continues a checkpoint goes on reading."""
    cursors = all_cursors(state)
    # The lanes that have had their turn in the round are the first ones of all, and so the first
    # ones of each rank: lanes 0 to 5 with turns 1, 1, 1, 1, 0, 0 are dealt to two ranks as 0, 2, 4
    # and 1, 3, 5 with turns 1, 1, 0, so on both the last lane is next.
    had_turn = [bool(state["lanes"][str(lane)][-1]) for lane in layout.lanes]
    return Position(
        cursors={lane: cursors[lane] for lane in layout.lanes},
        next_lane=had_turn.index(False) if False in had_turn else 0,
    )


def counters_of(state: Mapping[str, Any], layout: Layout) -> dict[str, int]:
    """Returns a rank's counters; on another number of ranks, its share of the sums over all."""
    of_rank = {rank: dict(each["counters"]) for rank, each in state["ranks"].items()}
    if _is_same_world(state, layout):
        return of_rank[str(layout.rank)]
    return shared_out(list(of_rank.values()), rank=layout.rank, world_size=layout.world_size)


def all_cursors(state: Mapping[str, Any]) -> dict[int, Cursor]:
    """Returns the cursor of each lane that a checkpoint holds."""
    return {int(lane): Cursor(*entry[:-1]) for lane, entry in state["lanes"].items()}


def _is_same_world(state: Mapping[str, Any], layout: Layout) -> bool:
    return bool(state["settings"]["world_size"] == layout.world_size)


def _united(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    entries = {key: value for part in parts for key, value in part.items()}
    return dict(sorted(entries.items(), key=lambda entry: int(entry[0])))


def _require_same_total(name: str, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Compares the sizes of all ranks together."""
    before, now = (_total(each[name], each["world_size"]) for each in (saved, settings))
    if before == now:
        return
    raise ResumeMismatchError(
        f"the checkpoint was taken with {name}={saved[name]!r} on each of {saved['world_size']} "
        f"ranks, {before!r} in all; this dataset has {name}={settings[name]!r} on each of "
        f"{settings['world_size']}, {now!r} in all. Choose {name} so that the total is the same, "
        f"or start a new run."
    )


def _total(value: Any, world_size: int) -> Any:
    """Returns a size over all ranks; of a schedule, [[step, size], ...], each of its sizes."""
    if isinstance(value, int):
        return value * world_size
    return [[step, size * world_size] for step, size in value]
