"""What a checkpoint holds, and how it is dealt to any number of ranks. Pure functions.

A state is made of plain dicts, lists, strings and numbers, so that `torch.load(weights_only=True)`
and even json read it back. It is keyed by lane and by rank: the states of several ranks merge by
uniting them, and a rank of another layout takes the lanes that are its own. Everything below these
keys is a list, which `torch.distributed.checkpoint` keeps whole.
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
from jest_stream.pipeline.super_batches import Position, Scored, SuperBatch
from jest_stream.types import Cursor, Selection

VERSION = 2

_SHARED = ("step", "epoch", "epoch_step", "epoch_batches")
# Per rank; what counts is the product with the number of ranks.
_PER_RANK = ("batch_size", "super_batch_size")
_DTYPES = {
    str(t): t for t in (torch.int64, torch.float16, torch.float32, torch.float64, torch.bool)
}

Record = list[Any]
"""A super-batch in flight: its size, the step of the weights behind its choice, and the choice.
New weights would choose otherwise."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a rank is."""

    step: int
    """Batches handed out."""
    epoch: int
    """Passes begun before this one, where `repeat=False`."""
    epoch_step: int
    """Batches handed out in this epoch."""
    epoch_batches: int | None
    """Batches of this pass, where that was computed beforehand."""
    position: Position
    """Where the first super-batch starts that was not handed out."""
    in_flight: list[Record]
    """Super-batches that were chosen from and not handed out, the next one first."""
    counters: dict[str, int]
    """As `Metrics.state_dict` gives them."""


def record_of(size: int, weights_step: int | None, selection: Selection) -> Record:
    """Returns what a checkpoint keeps of a super-batch in flight."""
    columns = []
    for each in fields(Selection):
        tensor = getattr(selection, each.name)
        columns.append([each.name, str(tensor.dtype), tensor.tolist()])
    return [size, weights_step, columns]


def read_record(record: Record, device: torch.device) -> tuple[int, int | None, Selection]:
    """Returns what `record_of` was given, with its tensors on `device`."""
    size, weights_step, columns = record
    tensors = {
        name: torch.tensor(values, dtype=_DTYPES[dtype], device=device)
        for name, dtype, values in columns
    }
    return size, weights_step, Selection(**tensors)


def state_of(
    progress: Progress, settings: Mapping[str, Any], layout: Layout, learner_copy: Any
) -> dict[str, Any]:
    """Returns the state of one rank.

    Args:
      progress: how far it is.
      settings: what must match on load, by name; with `lanes` and `world_size`.
      layout: whose state this is.
      learner_copy: weights to keep with it, or None.
    """
    cursors, next_lane = progress.position
    return {
        "version": VERSION,
        "layout": dict(settings),
        **{name: getattr(progress, name) for name in _SHARED},
        # Where each lane goes on, and whether it has had its turn in the round at hand.
        "lanes": {
            str(lane): [*cursors[lane], int(turn < next_lane)]
            for turn, lane in enumerate(layout.lanes)
        },
        "ranks": {
            str(layout.rank): {
                "in_flight": list(progress.in_flight),
                "counters": [list(item) for item in progress.counters.items()],
            }
        },
        "learner_copy": learner_copy,
    }


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns one state of all ranks, which any layout can load.

    Args:
      states: of every rank, in any order, taken after the same step. The learner copy of the first
        is kept: the ranks of a data-parallel run hold the same weights.

    Raises:
      ResumeMismatchError: if they are not of one moment of one run, or one is missing.
    """
    first = states[0]
    for other in states:
        _require_version(other)
        for name in ("layout", *_SHARED):
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
    world_size, num_lanes = first["layout"]["world_size"], first["layout"]["lanes"]
    for name, wanted in (("ranks", world_size), ("lanes", num_lanes)):
        if len(merged[name]) != wanted:
            raise ResumeMismatchError(
                f"the states hold {name} {', '.join(merged[name])}, but the run has {wanted}. "
                f"Merge the states of all {world_size} ranks."
            )
    return merged


def lanes_to_resume(state: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    """Returns the lanes of a checkpoint, if a dataset of these settings may continue it.

    Args:
      state: of a rank, or merged.
      settings: the dataset's own; `lanes` and `lookahead` are None where any number is
        right.

    Raises:
      ResumeMismatchError: if it was taken under other settings; names both values.
    """
    _require_version(state)
    saved, world_size = state["layout"], settings["world_size"]
    is_same_world = saved["world_size"] == world_size
    for name, value in settings.items():
        if name == "world_size" or (name in ("lanes", "lookahead") and value is None):
            continue
        if name in _PER_RANK and not is_same_world:
            _require_same_total(name, saved, settings)
        elif saved[name] != value:
            raise ResumeMismatchError(
                f"the checkpoint was taken with {name}={saved[name]!r}, this dataset has "
                f"{name}={value!r}. Resume with the former value, or start a new run."
            )
    num_lanes: int = saved["lanes"]
    if num_lanes % world_size:
        raise ResumeMismatchError(
            f"the checkpoint was taken with lanes={num_lanes} on {saved['world_size']} ranks, "
            f"which {world_size} ranks cannot share out evenly. Resume on a number of ranks that "
            f"divides {num_lanes}."
        )
    return num_lanes


def deal(state: Mapping[str, Any], layout: Layout) -> Progress:
    """Returns what a rank takes of a checkpoint that fits it.

    With the ranks of before, each goes on with its own super-batches in flight. Other ranks begin
    at the first of them, to be read and chosen from anew; lanes and counters are shared out.

    Raises:
      ResumeMismatchError: if the state lacks what the rank needs.
    """
    needed = [str(lane) for lane in layout.lanes]
    is_same_world = state["layout"]["world_size"] == layout.world_size
    found = state["lanes"]
    is_known = str(layout.rank) in state["ranks"] or not is_same_world
    if not is_known or not found.keys() >= set(needed):
        raise ResumeMismatchError(
            f"the checkpoint is of rank {', '.join(state['ranks'])} of "
            f"{state['layout']['world_size']} and of lanes {', '.join(found)}; this is rank "
            f"{layout.rank} of {layout.world_size}, which reads lanes {', '.join(needed)}. Load "
            f"on each rank the state that it saved, or on all the one that gather_state_dict made."
        )
    of_rank = {rank: dict(each["counters"]) for rank, each in state["ranks"].items()}
    if is_same_world:
        in_flight = list(state["ranks"][str(layout.rank)]["in_flight"])
        counters = of_rank[str(layout.rank)]
    else:
        in_flight = []
        counters = shared_out(
            list(of_rank.values()), rank=layout.rank, world_size=layout.world_size
        )
    had_turn = [bool(found[lane][-1]) for lane in needed]
    return Progress(
        step=state["step"],
        epoch=state["epoch"],
        epoch_step=state["epoch_step"],
        epoch_batches=state["epoch_batches"] if is_same_world else None,
        position=Position(
            cursors={int(lane): Cursor(*found[lane][:-1]) for lane in needed},
            next_lane=had_turn.index(False) if False in had_turn else 0,
        ),
        in_flight=in_flight,
        counters=counters,
    )


def all_cursors(state: Mapping[str, Any]) -> dict[int, Cursor]:
    """Returns where every lane goes on that the state holds."""
    return {int(lane): Cursor(*place[:-1]) for lane, place in state["lanes"].items()}


def _united(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    entries = {key: value for part in parts for key, value in part.items()}
    return dict(sorted(entries.items(), key=lambda entry: int(entry[0])))


def _require_version(state: Mapping[str, Any]) -> None:
    if state.get("version") != VERSION:
        raise ResumeMismatchError(
            f"the checkpoint has format version {state.get('version')}, this release reads "
            f"{VERSION}. Resume with the release that wrote it."
        )


def _require_same_total(name: str, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Compares what all ranks together read per step."""
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
    """A size over all ranks; of a schedule, [[step, size], ...], each of its sizes."""
    if isinstance(value, int):
        return value * world_size
    return [[step, size * world_size] for step, size in value]


@dataclass
class Standing:
    """What changes as batches are handed out. Owned by a `Pipeline`."""

    step: int = 0
    """Batches handed out."""
    epoch: int = 0
    """Passes begun before this one, where `repeat=False`."""
    epoch_step: int = 0
    """Batches handed out in this epoch; 0 again as soon as it is complete, where its length is
    known before."""
    epoch_batches: int | None = None
    """Batches of this pass, where that was computed beforehand."""
    in_flight: deque[Scored] = field(default_factory=deque)
    """Super-batches that were chosen from and not handed out, the next one first."""
    restored: list[Record] = field(default_factory=list)
    """Those of a checkpoint that were not yet read again; they come behind."""
    tail: SuperBatch | None = None
    """Too small for a batch: where a pass has ended."""
    is_resumed: bool = False
    """Whether a checkpoint was loaded and nothing handed out since."""
    has_begun: bool = False
    """Whether a batch was handed out or a checkpoint loaded."""

    def copy(self) -> Standing:
        """Returns the same, on its own from now on."""
        return replace(self, in_flight=self.in_flight.copy(), restored=self.restored.copy())
