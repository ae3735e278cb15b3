"""The schedule is tested alone: real reader and batches, a selector that takes the first rows.

pytest tests/pipeline/test_pipeline.py
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.pairs import Pairs, alone, key_of, sizes_of, stream_config

from jest_stream.errors import ConfigError
from jest_stream.metrics.metrics import Metrics
from jest_stream.pipeline.batches import Batches
from jest_stream.pipeline.device.streams import Ring, Slot
from jest_stream.pipeline.schedule import Pipeline
from jest_stream.pipeline.super_batches import ScoredSuperBatch, SuperBatch
from jest_stream.sources import open_source
from jest_stream.types import Selection

pytestmark = pytest.mark.usefixtures("no_leaks")


class FirstOnes:
    """A selector: takes the first candidates, and fails at a step as often as it is told to."""

    groups: list[str] = []
    weights_step = None

    def __init__(self) -> None:
        self.ring = Ring()
        self.weights: list[tuple[int, int]] = []  # (step of the batch, step of the weights)
        self.failures: dict[int, BaseException] = {}  # by the step of the batch; each comes once

    def place(self, device: torch.device) -> None:
        self.ring.place(device)

    def slot(self, in_use: Collection[ScoredSuperBatch]) -> Slot:
        return self.ring.slot([scored.super_batch.slot for scored in in_use])

    def select(
        self, super_batch: SuperBatch, *, batch_size: int, step: int, now: int
    ) -> ScoredSuperBatch:
        if step in self.failures:
            raise self.failures.pop(step)
        self.weights.append((step, now))
        nothing = torch.zeros(0)
        found = Selection(
            **{name: nothing for name in Selection.__dataclass_fields__}
            | {"indices": torch.arange(batch_size), "weights": torch.ones(batch_size)}
            | {"is_finite": torch.tensor(True)}
        )
        return self.restore(super_batch, found, now)

    def restore(
        self, super_batch: SuperBatch, selection: Selection, weights_step: int | None
    ) -> ScoredSuperBatch:
        pending = super_batch.slot.restore(selection)
        return ScoredSuperBatch(
            super_batch=super_batch, selection=pending, weights_step=weights_step
        )

    def load_state_dict(self, state: None) -> None:
        assert state is None


class Run:
    """A pipeline over two shards of 10: batches of 2 out of 4, two of a shard each."""

    def __init__(
        self, *, lookahead: int = 1, lengths: tuple[int, ...] = (10, 10), **o: Any
    ) -> None:
        self.selector, self.metrics, cpu = FirstOnes(), Metrics(), torch.device("cpu")
        self.pipeline = Pipeline(
            stream_config(lookahead=lookahead, **o),
            sizes_of(2, 4),
            source=open_source(Pairs(list(lengths))),
            layout=alone(len(lengths)),
            score_view=key_of,
            batches=Batches(None, {}),
            selector=self.selector,  # type: ignore[arg-type]
            metrics=self.metrics,
            devices=lambda: (cpu, cpu),
        )

    def next(self) -> list[str] | None:
        batch = self.pipeline.next_batch()
        return None if batch is None else batch["key"]

    def take(self, num_batches: int) -> list[list[str] | None]:
        return [self.next() for _ in range(num_batches)]

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.pipeline.state_dict(include_learner_copy=False)
        return json.loads(json.dumps(state))


@pytest.mark.parametrize(
    ("lookahead", "weights"),
    [
        # (batch, weights): each call scores until `lookahead` batches follow the one it returns.
        (0, [(0, 0), (1, 1), (2, 2)]),
        (1, [(0, 0), (1, 0), (2, 1), (3, 2)]),
        (2, [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)]),
    ],
)
def test_a_batch_is_selected_with_weights_lookahead_steps_old(
    lookahead: int, weights: list[tuple[int, int]]
) -> None:
    run = Run(lookahead=lookahead)
    run.take(3)
    assert run.selector.weights == weights
    assert len(run.pipeline.run.in_flight) == lookahead


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_an_error_waits_until_the_batches_before_it_are_handed_out(lookahead: int) -> None:
    expected = Run().take(5)
    run = Run(lookahead=lookahead)
    run.selector.failures[2] = ValueError("of batch 2")
    assert run.take(2) == expected[:2]
    with pytest.raises(ValueError, match="of batch 2"):
        run.next()
    assert run.pipeline.run.step == 2
    assert run.take(3) == expected[2:], "the failed super-batch is read again, and none is lost"


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 1, 3])
def test_ctrl_c_undoes_the_call_that_it_comes_in(lookahead: int, step: int) -> None:
    plain = Run(lookahead=lookahead)
    expected = plain.take(5)
    run = Run(lookahead=lookahead)
    run.selector.failures[step] = KeyboardInterrupt()
    before, found = run.state(), []
    for _ in range(5):
        try:
            found.append(run.next())
        except KeyboardInterrupt:
            assert run.state() == before
            found.append(run.next())
        before = run.state()
    assert found == expected
    assert run.state() == plain.state()


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_checkpoint_resumes_with_the_selections_in_flight(lookahead: int) -> None:
    first, resumed = Run(lookahead=lookahead), Run(lookahead=lookahead)
    first.take(2)
    state = first.state()
    assert len(state["ranks"]["0"]["in_flight"]) == lookahead
    resumed.pipeline.load_state_dict(state)
    assert resumed.state() == state
    assert resumed.take(3) == first.take(3)
    scored_again = {step for step, _ in resumed.selector.weights} & set(range(2, 2 + lookahead))
    assert not scored_again
    assert resumed.state() == first.state()


def test_a_refused_checkpoint_changes_nothing() -> None:
    run = Run()
    run.take(2)
    before = run.state()
    other = {**before, "settings": {**before["settings"], "seed": 5}}
    with pytest.raises(Exception, match="seed=5, this dataset has seed=0"):
        run.pipeline.load_state_dict(other)
    assert run.state() == before
    assert run.take(2) == Run().take(4)[2:]


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_pass_ends_with_none_and_the_next_one_follows(lookahead: int) -> None:
    """18 examples are 4 super-batches of 4; 2 are left, which are the last batch."""
    run = Run(lookahead=lookahead, lengths=(9, 9), repeat=False)
    first = run.take(6)
    assert None not in first[:5] and first[5] is None
    assert (run.pipeline.run.epoch, run.pipeline.run.epoch_step) == (1, 0)
    second = run.take(6)
    assert second == first, "a lane of one shard reads it in the same order"
    assert run.metrics.state_dict()["samples_read"] == 2 * 18


def test_examples_too_few_for_a_batch_are_counted_at_the_end() -> None:
    run = Run(lengths=(3, 2), repeat=False)
    assert run.next() is not None and run.next() is None
    assert run.metrics.state_dict()["epoch_tail"] == 1
    with pytest.raises(ConfigError, match="a whole pass over the data gives this rank 1 examples"):
        Run(lengths=(1,), repeat=False).next()


def test_epochs_of_a_given_length_count_from_zero_again() -> None:
    run = Run(steps_per_epoch=3)
    steps = []
    for _ in range(7):
        run.next()
        steps.append(run.pipeline.run.epoch_step)
    assert steps == [1, 2, 0, 1, 2, 0, 1]
