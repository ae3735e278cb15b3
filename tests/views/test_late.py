"""Train views made ahead of time are the same with any workers, and leave nothing behind.

pytest tests/views/test_late.py
"""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from support.leaks import children, no_leaks, nothing_left_behind, stop_helpers
from support.models import flipped, tiny_dataset
from support.shards import make_example, members, write_shards, write_tar
from torch import Tensor

from jest_stream.errors import (
    BadExampleError,
    ConfigError,
    ShardTruncatedError,
    StalledError,
    UserCodeError,
    WorkerDiedError,
)
from jest_stream.pipeline.batches import Batches
from jest_stream.pipeline.device.pending import PendingSelection
from jest_stream.pipeline.device.streams import Ring
from jest_stream.pipeline.super_batches import Position, ScoredSuperBatch, SuperBatch
from jest_stream.types import Selection
from jest_stream.views.late import LateViews
from jest_stream.views.train import TrainView
from jest_stream.workers import process
from jest_stream.workers.transport import WorkerTraceback

__all__ = ["no_leaks"]
pytestmark = pytest.mark.usefixtures("no_leaks")

WORKERS = [0, 1, 2, 4]


def late(transform: Any = flipped, num_workers: int = 2, **options: Any) -> LateViews:
    view = TrainView(transform=transform, seed=3, rank=0)
    return LateViews(view, num_workers=num_workers, **{"timeout_s": 60.0, **options})


def chosen(first: int = 0, size: int = 6) -> dict[str, Any]:
    examples = [make_example(index) for index in range(first, first + size)]
    return {
        "raw_image": [("jpg", example["jpg"]) for example in examples],
        "key": [example["__key__"] for example in examples],
        "shard": [f"{index // 4}.tar" for index in range(first, first + size)],
    }


def taken(views: LateViews, num_steps: int = 4) -> list[Any]:
    for step in range(num_steps):
        views.start(chosen(6 * step), step=step)
    made = [views.take(step) for step in range(num_steps)]
    views.forget()
    return made


@pytest.mark.parametrize("num_workers", [1, 2, 4, 9])
def test_views_do_not_depend_on_who_makes_them(num_workers: int) -> None:
    found, expected = taken(late(num_workers=num_workers)), taken(late(num_workers=0))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len({float(view[0, 0, 0, 0]) for view in expected}) == 4


def as_mapping(image: Any) -> dict[str, Tensor]:
    view = flipped(image)
    return {"pixel_values": view, "mean": view.mean()}


def test_views_that_are_mappings_come_whole() -> None:
    found, expected = taken(late(as_mapping)), taken(late(as_mapping, num_workers=0))
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys() == {"pixel_values", "mean"}
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_example_has_its_own_random_state_wherever_it_stands() -> None:
    views = late(num_workers=0)
    views.start(chosen(size=3), step=0)
    views.start(chosen(size=2), step=1)
    first, second = views.take(0), views.take(1)
    views.forget()
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    alone = TrainView(transform=flipped, seed=3, rank=0)
    row = {name: column[2:] for name, column in chosen(size=3).items()}
    assert torch.equal(alone(row, step=0, positions=[2])["image"], first[2:])
    assert not torch.equal(first[:2], second)
    other = TrainView(transform=flipped, seed=3, rank=1)
    assert not torch.equal(other(row, step=0, positions=[2])["image"], first[2:])


def test_more_batches_than_may_be_sent_wait_their_turn() -> None:
    found, expected = taken(late(), num_steps=40), taken(late(num_workers=0), num_steps=40)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_start_method_gives_the_same_views(method: str) -> None:
    expected = taken(late(num_workers=0), 2)
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        found = taken(late(num_workers=1), 2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        with pytest.raises(ConfigError, match=f"start method '{method}' .* num_workers=0"):
            taken(late(lambda image: flipped(image), num_workers=1))
    finally:
        torch.multiprocessing.set_start_method(before, force=True)
        stop_helpers()


def picky(image: Any) -> Tensor:
    """Fails at random, which is the same in every process, about once in twelve."""
    view = flipped(image)
    if torch.rand(()) < 0.08:
        raise LookupError(f"drew {float(view[0, 0, 0]):.6f}")
    return view


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_an_error_of_a_transform_comes_with_its_batch_and_its_traceback(num_workers: int) -> None:
    messages = []
    for count in (0, num_workers):
        views = late(picky, num_workers=count)
        for step in range(6):
            views.start(chosen(6 * step), step=step)
        step = 0
        with pytest.raises(LookupError, match="drew") as raised:
            for step in range(6):
                views.take(step)
        assert children() == []  # at once
        messages.append((step, str(raised.value)))
        with pytest.raises(LookupError, match="drew"):  # asked again, it says so again
            views.take(step)
        if count:
            assert isinstance(raised.value.__cause__, WorkerTraceback)
            assert "in picky" in str(raised.value.__cause__)
        views.forget()
    assert messages[0] == messages[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_cannot_be_decoded_is_named(num_workers: int) -> None:
    broken = chosen()
    broken["raw_image"][3] = ("jpg", b"no picture")
    views = late(num_workers=num_workers)
    views.start(broken, step=0)
    with pytest.raises(BadExampleError, match="cannot be decoded as image") as raised:
        views.take(0)
    assert (raised.value.key, raised.value.shard) == (broken["key"][3], broken["shard"][3])
    views.forget()


SHAPES = "image must have one shape.*Let train_transform resize"


def one_shape_a_process(image: Any) -> Tensor:
    return torch.zeros(3, 4, 4 + os.getpid() % 97)


def test_shapes_that_differ_between_workers_are_the_train_transforms() -> None:
    """Each of them makes consistent views."""
    views = late(one_shape_a_process, num_workers=4)
    views.start(chosen(), step=0)
    with pytest.raises(ConfigError, match=SHAPES):
        views.take(0)
    views.forget()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("transform", "kind", "match"),
    [
        (lambda image: next(iter(())), UserCodeError, "train_transform raised StopIteration"),
        (lambda image: image, ConfigError, "Pass train_transform="),
        (lambda image: torch.zeros(int(4 * torch.rand(())) + 1), ConfigError, SHAPES),
        (lambda image: image.no_such_method(), AttributeError, "no_such_method"),
    ],
)
def test_mistakes_in_programs_are_never_bad_examples(
    num_workers: int, transform: Any, kind: type[Exception], match: str
) -> None:
    views = late(transform, num_workers=num_workers)
    views.start(chosen(size=24), step=0)
    with pytest.raises(kind, match=match):
        views.take(0)
    views.forget()


def test_a_killed_worker_is_named_and_its_views_are_made_again() -> None:
    expected = taken(late(num_workers=0), 2)
    views = late()
    views.start(chosen(), step=0)
    assert torch.equal(views.take(0), expected[0])
    victim = max(children(), key=lambda child: child.pid)
    victim.kill()
    views.start(chosen(6), step=1)
    pattern = (
        rf"train view worker 1 of 2 \(process {victim.pid}\), which makes train views.*SIGKILL"
    )
    with pytest.raises(WorkerDiedError, match=pattern):
        views.take(1)
    assert children() == []
    assert torch.equal(views.take(1), expected[1])
    views.forget()


def test_a_transform_that_exits_is_named_with_the_example() -> None:
    views = late(lambda image: os._exit(3), num_workers=1)
    views.start(chosen(4), step=0)
    pattern = r"last example '000004' of shard '1.tar', ended with status 3"
    with pytest.raises(WorkerDiedError, match=pattern):
        views.take(0)
    views.forget()


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_transform_that_hangs_is_reported_with_its_stacks(
    is_deaf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_STOP_TIMEOUT_S", 0.5)

    def hang(image: Any) -> None:
        if is_deaf:  # not even SIGTERM helps
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()

    views = late(hang, num_workers=1, timeout_s=0.5)
    views.start(chosen(), step=0)
    with pytest.raises(StalledError, match=r"train view worker 0 of 1 .* timeout_s=0.5") as raised:
        views.take(0)
    assert "in hang" in str(raised.value) and "'000000'" in str(raised.value)
    assert children() == []
    views.forget()


def test_dropping_it_stops_its_workers() -> None:
    views = late()
    views.start(chosen(), step=0)
    assert len(children()) == 2
    del views
    assert children() == []


jest = partial(tiny_dataset, train_transform=flipped)


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_batches_are_the_same_with_any_number_of_workers(
    shards: list[str], num_workers: int, lookahead: int
) -> None:
    expected = islice(jest(shards, lookahead=lookahead), 5)
    found = islice(jest(shards, lookahead=lookahead, num_workers=num_workers), 5)
    for a, b in zip(found, expected, strict=True):
        assert a["key"] == b["key"]
        assert torch.equal(a["image"], b["image"])


def test_a_resumed_run_makes_the_views_in_flight_again(shards: list[str]) -> None:
    expected = [batch["image"] for batch in islice(jest(shards, lookahead=2), 6)]
    dataset = jest(shards, lookahead=2, num_workers=2)
    for _ in islice(dataset, 2):
        pass
    state = dataset.state_dict()
    assert len(next(iter(state["ranks"].values()))["in_flight"]) == 2
    resumed = jest(shards, lookahead=2, num_workers=1)
    resumed.load_state_dict(state)
    found = [batch["image"] for batch in islice(resumed, 4)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected[2:], strict=True))


def test_views_are_asked_for_in_the_call_that_chose_them(
    shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    start, take = LateViews.start, LateViews.take

    def noted_start(self: LateViews, rows: Any, *, step: int) -> None:
        seen.append(("start", step))
        start(self, rows, step=step)

    def noted_take(self: LateViews, step: int) -> Any:
        seen.append(("take", step))
        return take(self, step)

    monkeypatch.setattr(LateViews, "start", noted_start)
    monkeypatch.setattr(LateViews, "take", noted_take)
    for _ in islice(jest(shards, lookahead=1, num_workers=2), 3):
        seen.append(("handed out", 0))
    given = ("handed out", 0)
    assert seen == [
        *[("start", 0), ("start", 1), ("take", 0), given],
        *[("start", 2), ("take", 1), given],
        *[("start", 3), ("take", 2), given],
    ]


def test_scoring_ahead_is_one_call_more_where_choices_reach_the_host_late(
    shards: list[str],
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    views = late(num_workers=0)
    assert [Batches(views, {}).lookahead(device) for device in (cpu, cuda)] == [1, 2]
    assert [Batches(None, {}).lookahead(device) for device in (cpu, cuda)] == [1, 1]
    dataset = jest(shards)
    next(iter(dataset))
    assert dataset.state_dict()["settings"]["lookahead"] == 1
    chose_two = jest(shards, lookahead=2)
    expected = [batch["image"] for batch in islice(chose_two, 3)]
    again = jest(shards, lookahead=2)
    for _ in islice(again, 1):
        pass
    resumed = jest(shards)  # takes what the checkpoint was taken with
    resumed.load_state_dict(again.state_dict())
    found = [batch["image"] for batch in islice(resumed, 2)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected[1:], strict=True))
    assert resumed.state_dict()["settings"]["lookahead"] == 2


def test_what_was_not_finite_is_not_made(shards: list[str]) -> None:
    views = late(num_workers=0)
    columns = {**chosen(), "text": torch.zeros(6, 1)}
    candidates = SuperBatch(
        columns=columns,
        on_host=columns,
        slot=Ring(torch.device("cpu")).slot(),
        size=6,
        position=Position({}, 0),
        skipped={},
    )
    indices = torch.tensor([9, 9])  # beyond the candidates
    nothing = torch.zeros(0, dtype=torch.int64)
    selection = Selection(
        **{name: nothing for name in Selection.__dataclass_fields__}
        | {"indices": indices, "is_finite": torch.tensor(False)}
    )
    scored = ScoredSuperBatch(
        super_batch=candidates, selection=PendingSelection(selection), weights_step=None
    )
    Batches(views, {}).start(scored, step=0)
    assert not views.has(0)


@pytest.mark.parametrize("ending", ["break", "exception", "close", "with", "drop", "end of pass"])
def test_however_a_loop_ends_nothing_is_left(shards: list[str], ending: str) -> None:
    with nothing_left_behind():
        dataset = jest(shards, num_workers=2, repeat=ending != "end of pass")
        if ending == "exception":
            with pytest.raises(ZeroDivisionError):
                for _ in dataset:
                    raise ZeroDivisionError
        elif ending == "end of pass":
            assert len(list(dataset)) == 8
        else:
            iterator = iter(dataset)
            next(iterator)
            assert len(children()) == 4  # two that read, two that make train views
            if ending == "close":
                dataset.close()
            elif ending == "with":
                with dataset:
                    next(iterator)
            del iterator
        if ending == "drop":
            del dataset
        assert children() == []


def test_a_loop_that_was_broken_off_goes_on_with_the_same_batches(shards: list[str]) -> None:
    expected = [batch["image"] for batch in islice(jest(shards), 6)]
    dataset = jest(shards, num_workers=2)
    found = [batch["image"] for _ in range(3) for batch in islice(dataset, 2)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_train_view_comes_after_the_batches_before_it(
    shards: list[str], num_workers: int
) -> None:
    expected = []
    with pytest.raises(LookupError) as first:
        for batch in jest(shards, train_transform=picky, lookahead=2):
            expected.append(batch["key"])
    found = []
    dataset = jest(shards, train_transform=picky, lookahead=2, num_workers=num_workers)
    iterator = iter(dataset)
    with pytest.raises(LookupError, match=str(first.value)):
        for batch in iterator:
            found.append(batch["key"])
    assert found == expected and len(found) > 0
    assert children() == []
    with pytest.raises(LookupError, match=str(first.value)):  # said again, never passed over
        next(iterator)
    del iterator, first


def test_an_error_in_reading_leaves_no_worker_of_either_kind(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, num_shards=1, examples_per_shard=16)
    examples = [make_example(index) for index in range(16)]
    write_tar(Path(paths[0]), members(examples))
    data = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(data[: data.index(b"000013.jpg")])
    iterator = iter(jest(paths, num_workers=2))
    next(iterator)
    with pytest.raises(ShardTruncatedError):
        next(iterator)
    assert children() == []
    del iterator
