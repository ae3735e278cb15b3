"""Scoring beside training gives the same batches: nothing touched too early, no wait too many.

    pytest tests/pipeline/test_streams.py

Runs the whole dataset on `QueuedDevice`, a model of a device with streams that looks for accesses
that nothing orders. The tests on a real one are in `test_streams_gpu.py`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401  a fixture
from support.models import TinyTwoTower, flipped, train_step
from support.queued_device import QueuedDevice
from support.stream_runs import SCENARIOS, Learner, dataset_of, scenario_of, take
from torch import Tensor

from jest_stream import SelectionConfig
from jest_stream.errors import NonFiniteError
from jest_stream.pipeline.device import streams
from jest_stream.pipeline.device.pending import PendingSelection
from jest_stream.pipeline.device.streams import Slot

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Callable[[QueuedDevice | None], None]:
    """Has datasets work on a device; None: on the CPU, as ever."""
    real = streams.backend_of

    def use(device: QueuedDevice | None) -> None:
        monkeypatch.setattr(streams, "backend_of", real if device is None else lambda _: device)
        # Selection asks for values where tensors lie on a CPU, as those of the model do.
        monkeypatch.setattr("jest_stream.selection.drawing._require_finite", lambda _: None)

    return use


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_batches_are_those_of_a_cpu_and_nothing_is_touched_too_early(
    shards: list[str], patch: Callable[[QueuedDevice | None], None], name: str
) -> None:
    device = QueuedDevice()
    patch(device)
    got = SCENARIOS[name](shards, device)
    assert device.races == []
    assert device.host_reads == []
    patch(None)
    expected = SCENARIOS[name](shards, None)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one["key"] == other["key"] and one.keys() == other.keys()
        for column in one.keys() - {"key"}:
            torch.testing.assert_close(one[column], other[column], rtol=0, atol=0)


def waits_of(module: Any) -> list[str]:
    """Returns every line of the module that waits for an event."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return sorted(
        {
            lines[call.lineno - 1].strip().split("  #")[0]
            for call in calls
            if isinstance(call.func, ast.Attribute)
            and call.func.attr in ("wait_event", "synchronize")
        }
    )


def test_there_are_waits_to_leave_out() -> None:
    assert len(waits_of(streams)) >= 10


READ_BACK = "reported.synchronize()"
# The consumer's stream waits for the choice, and so does the host before it queues anything there:
# the former is enough for the device, the latter for the device and the host.
ALSO = {"consumer.wait_event(self._selected)": [READ_BACK]}
# The scenario that needs a wait, where a plain run is saved by other waits.
NEEDED_BY = {
    "self._filled.synchronize()": "broken off",
    "event.synchronize()": "resumed",
    "self.ready.synchronize()": "several streams",
    "writer.wait_event(self.ready)": "several streams",
    "writer.wait_event(self.readers.pop(weights))": "lookahead 2, refresh every 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("line", waits_of(streams))
def test_a_wait_that_is_left_out_is_caught(
    shards: list[str], patch: Callable[[QueuedDevice | None], None], line: str
) -> None:
    device = QueuedDevice(without=[line, *ALSO.get(line, ())])
    patch(device)
    SCENARIOS[NEEDED_BY.get(line, "lookahead 1, refresh every 1")](shards, device)
    assert device.skipped
    # Of two waits that were left out, the host's own is another line's matter.
    assert [race for race in device.races if not (line in ALSO and race.startswith("host"))]


def test_the_slots_are_made_once_and_there_is_one_more_than_the_lookahead(
    shards: list[str], patch: Callable[[QueuedDevice | None], None]
) -> None:
    for lookahead in (0, 1, 2):
        device = QueuedDevice()
        patch(device)
        learner = Learner(seed=1)
        with dataset_of(shards, learner, lookahead=lookahead, device_model=device) as dataset:
            with device.watched():
                take(dataset, learner, lookahead + 1)
                made = device.num_buffers
                assert made == (lookahead + 1) * 3  # image, text, and the choice
                take(dataset, learner, 6)
                assert device.num_buffers == made


@pytest.mark.parametrize(
    ("options", "num_waits"),
    [({"lookahead": 1}, 1), ({"lookahead": 2, "train_transform": flipped}, 1)],
)
def test_what_comes_next_is_queued_before_the_host_waits_for_a_choice(
    shards: list[str],
    patch: Callable[[QueuedDevice | None], None],
    options: dict[str, Any],
    num_waits: int,
) -> None:
    device = QueuedDevice()
    patch(device)
    learner = Learner(seed=1)
    with dataset_of(shards, learner, device_model=device, **options) as dataset:
        with device.watched():
            iterator = iter(dataset)
            for _ in range(4):
                next(iterator)
                device.log.clear()
            next(iterator)
            log = list(device.log)
    assert log.count(("host", "waits")) == num_waits  # for a choice; nothing else in a step
    before = log[: log.index(("host", "waits"))]
    scored = [entry for entry in log if entry[0].startswith("score")]
    assert scored and len([e for e in before if e[0].startswith("score")]) == len(scored)
    assert ("train", "index_select") in log and ("train", "index_select") not in before
    assert ("train", "_foreach_copy_") in before  # the refresh, on the stream that trains


def test_rows_gathered_on_the_scoring_stream_are_caught(
    shards: list[str],
    patch: Callable[[QueuedDevice | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Waiting for the producer is not enough: its allocator takes the batch's memory back."""

    @contextmanager
    def handing_out(slot: Slot) -> Iterator[None]:
        ring = slot._ring
        with ring.backend.use(ring.scoring):
            yield
        consumer = ring.backend.current_stream()
        consumer.wait_event(ring.scoring.record_event())
        slot._users.append(consumer.record_event())

    monkeypatch.setattr(Slot, "handing_out", handing_out)
    device = QueuedDevice()
    patch(device)
    scenario_of(lookahead=1, refresh_every=100)(shards, device)
    assert any("reuses index_select while train" in race for race in device.races)


def test_weights_that_still_lie_in_the_slot_are_caught(
    shards: list[str],
    patch: Callable[[QueuedDevice | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        PendingSelection, "weights", lambda pending, device: pending.on_device.weights
    )
    device = QueuedDevice()
    patch(device)
    scenario_of(lookahead=0, refresh_every=100)(shards, device)
    assert any("writes buffer" in race and "while train reads" in race for race in device.races)


@pytest.mark.parametrize("lookahead", [pytest.param(0, marks=pytest.mark.slow), 1, 2])
def test_any_order_that_the_waits_allow_gives_the_same_batches(
    shards: list[str], patch: Callable[[QueuedDevice | None], None], lookahead: int
) -> None:
    batches, expected, device = kept_run(shards, patch, lookahead=lookahead)
    for seed in range(15):
        device.replay(seed)
        for one, other in zip(batches, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "line",
    [
        "copying.wait_event(event)",
        "stream.wait_event(self._filled)",
        "stream.wait_event(ring.ready)",
        "consumer.wait_event(self._selected)",
    ],
)
def test_without_a_wait_some_order_gives_other_batches(
    shards: list[str], patch: Callable[[QueuedDevice | None], None], line: str
) -> None:
    """The races that are reported are real: some order of the work changes the data."""
    without = [line, *ALSO.get(line, ())]
    batches, expected, device = kept_run(shards, patch, lookahead=1, without=without)
    differs = False
    for seed in range(60):
        device.replay(seed)
        differs = any(not torch.equal(a, b) for a, b in zip(batches, expected, strict=True))
        if differs:
            break
    assert differs


def kept_run(
    shards: list[str],
    patch: Callable[[QueuedDevice | None], None],
    *,
    lookahead: int,
    without: Sequence[str] = (),
) -> tuple[list[Tensor], list[Tensor], QueuedDevice]:
    """Returns images and weights of some batches, what they held, and the device to replay."""
    device = QueuedDevice(without=without, keeps=True)
    patch(device)
    learner = Learner(seed=1)
    batches = []
    with dataset_of(shards, learner, lookahead=lookahead, device_model=device) as dataset:
        with device.watched():
            for batch in islice(dataset, 7):
                train_step(learner, (batch["image"], batch["text"]))
                batches += [batch["image"], batch["weight"]]
    return batches, [batch.clone() for batch in batches], device


def test_scores_that_are_not_finite_are_known_before_the_batch_is_handed_out(
    shards: list[str], patch: Callable[[QueuedDevice | None], None]
) -> None:
    device = QueuedDevice()
    patch(device)
    learner, factors = Learner(seed=1), [1.0]
    selection = SelectionConfig(score=lambda one, other: (one - other) * factors[0])
    options = {"selection": selection, "lookahead": 1, "device_model": device}
    with dataset_of(shards, learner, **options) as dataset, device.watched():
        keys = [batch["key"] for batch in islice(dataset, 1)]
        factors[0] = torch.nan
        next(iter(dataset))  # was chosen before; what is chosen now is for step 2
        with pytest.raises(NonFiniteError, match="for step 2"):
            next(iter(dataset))
        factors[0] = 1.0
        keys += [batch["key"] for batch in islice(dataset, 2)]
        assert dataset.metrics()["steps"] == 4
    assert len(keys) == 3
    assert device.races == []


def test_metrics_tell_how_long_the_device_worked(
    shards: list[str], patch: Callable[[QueuedDevice | None], None]
) -> None:
    device = QueuedDevice()
    patch(device)
    learner = Learner(seed=1)
    with dataset_of(shards, learner, device_model=device) as dataset, device.watched():
        take(dataset, learner, 3)
        metrics = dataset.metrics()
    assert metrics["scoring_device_s"] == metrics["selecting_device_s"] == pytest.approx(0.003)
    assert device.host_reads == []


def test_the_callers_autocast_and_modes_do_not_reach_scoring(shards: list[str]) -> None:
    keys = []
    for is_mixed in (False, True):
        learner = TinyTwoTower(seed=1)
        with dataset_of(shards, learner) as dataset:
            with (
                torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed),
                torch.inference_mode(is_mixed),
            ):
                batches = list(islice(dataset, 4))
                assert torch.is_autocast_enabled("cpu") == is_mixed
            keys.append([batch["key"] for batch in batches])
            assert not any(batch["image"].is_inference() for batch in batches)
    assert keys[0] == keys[1]
