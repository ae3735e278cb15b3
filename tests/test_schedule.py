"""`lookahead` and `refresh_every` set the schedule: the weights that choose each batch.

pytest tests/test_schedule.py
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from support.models import TinyTwoTower, tiny_dataset
from torch import Tensor

from jest_stream import SelectionConfig


class Recorder(TinyTwoTower):
    """Notes the step number that its weights carry, whenever a copy of it embeds."""

    def __init__(self, log: list[int]) -> None:
        super().__init__(seed=1)
        self.log = [log]  # in a list, and shared by copies through `__deepcopy__`
        self.register_buffer("stamp", torch.zeros(3))

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        copied = Recorder(self.log[0])
        copied.load_state_dict(self.state_dict())
        return copied

    def mark(self, step: int) -> None:
        """Fills the buffer and shifts every weight by nothing but the step."""
        with torch.no_grad():
            self.stamp.fill_(step)
            self.image.fill_(step + 1)

    def encode_image(self, image: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        assert (self.stamp == self.stamp[0]).all()
        assert (self.image == self.stamp[0] + 1).all(), "a torn copy"
        if len(image) > 1:  # a single row has its FLOPs counted, for metrics()
            self.log[0].append(int(self.stamp[0]))
        return super().encode_image(image) + image.flatten(1)[:, :16]


def run(shards: list[str], num_steps: int, **options: Any) -> tuple[list[int], list[int]]:
    """Returns the weights that scored each super-batch, and the staleness of each batch."""
    log: list[int] = []
    learner = Recorder(log)
    dataset = tiny_dataset(shards, learner=learner, **options)
    learner.mark(0)
    staleness = []
    for step, _ in enumerate(islice(dataset, num_steps)):
        staleness.append(int(dataset.metrics()["staleness"]))
        learner.mark(step + 1)  # the training step on batch `step`
    return log, staleness


@pytest.mark.parametrize(
    ("options", "weights", "staleness"),
    [
        # Super-batch t is scored with the weights in row `weights`, and trained on at step t.
        ({"lookahead": 0}, [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]),
        ({"lookahead": 1}, [0, 0, 1, 2, 3, 4, 5], [0, 1, 1, 1, 1, 1]),
        ({"lookahead": 2}, [0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 2, 2]),
        ({"lookahead": 0, "refresh_every": 3}, [0, 0, 0, 3, 3, 3], [0, 1, 2, 0, 1, 2]),
        ({"lookahead": 1, "refresh_every": 2}, [0, 0, 0, 2, 2, 4, 4], [0, 1, 2, 1, 2, 1]),
    ],
)
def test_each_super_batch_is_scored_with_the_promised_weights(
    shards: list[str], options: dict[str, int], weights: list[int], staleness: list[int]
) -> None:
    assert run(shards, 6, **options) == (weights, staleness)


@pytest.mark.parametrize(
    "selection",
    [
        SelectionConfig(method="uniform"),
        SelectionConfig(score="easy_reference"),
        SelectionConfig(method="independent", score="easy_reference"),
    ],
)
def test_lookahead_does_not_change_what_a_rule_without_learner_chooses(
    shards: list[str], selection: SelectionConfig
) -> None:
    sequences = []
    for lookahead in (0, 1, 2):
        dataset = tiny_dataset(
            shards, learner=None, super_batch_size=16, selection=selection, lookahead=lookahead
        )
        sequences.append([batch["key"] for batch in islice(dataset, 6)])
    assert sequences[0] == sequences[1] == sequences[2]


def test_refresh_takes_the_weights_at_once(shards: list[str]) -> None:
    log: list[int] = []
    learner = Recorder(log)
    learner.mark(0)
    dataset = tiny_dataset(shards, learner=learner, refresh_every=1000, lookahead=0)
    iterator = iter(dataset)
    next(iterator)
    learner.mark(1)
    next(iterator)
    learner.mark(2)
    dataset.refresh()
    next(iterator)
    assert log == [0, 0, 2]
    assert dataset.metrics()["staleness"] == 0


def test_the_learner_is_read_at_the_first_batch_and_never_modified(shards: list[str]) -> None:
    learner = TinyTwoTower(seed=1).train()
    dataset = tiny_dataset(shards, learner=learner)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    next(iter(dataset))
    assert learner.training
    assert all(parameter.grad is None for parameter in learner.parameters())
    torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)
