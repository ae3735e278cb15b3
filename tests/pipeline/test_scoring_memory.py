"""Scoring that runs out of memory goes on in smaller parts; training is not harmed.

    pytest tests/pipeline/test_scoring_memory.py

The encoder raises what a CUDA device raises.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401  a fixture
from support.models import TinyTwoTower, tiny_dataset, train_step
from torch import Tensor

from jest_stream import JESTDataset, ScoringConfig
from jest_stream.errors import ScoringMemoryError

pytestmark = pytest.mark.usefixtures("no_leaks")


class Narrow(TinyTwoTower):
    """A model that has memory for a few rows only, where it scores."""

    most = 1000
    sizes: list[int] = []

    def encode_image(self, image: Tensor) -> Tensor:
        if not self.training:
            self.sizes.append(len(image))
            if len(image) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().encode_image(image)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> type[Narrow]:
    monkeypatch.setattr(Narrow, "sizes", [])
    monkeypatch.setattr(Narrow, "most", 1000)
    return Narrow


def dataset_of(shards: list[str], learner: TinyTwoTower, **options: Any) -> JESTDataset:
    return tiny_dataset(shards, learner=learner, super_batch_size=12, **options)


def test_parts_are_halved_until_they_fit_and_stay_so(
    shards: list[str], narrow: type[Narrow]
) -> None:
    keys = []
    for most in (1000, 3):
        narrow.most = most
        narrow.sizes.clear()
        learner = narrow(seed=1)
        with dataset_of(shards, learner) as dataset:
            kept = []
            for batch in islice(dataset, 3):
                kept.append(batch["key"])
                train_step(learner, (batch["image"], batch["text"]))
        keys.append(kept)
    # 256 rows are asked for and 12 are there; once it is found that 3 fit, it stays at 3.
    assert narrow.sizes == [12, 6, *[3] * 4 * 4]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_where_not_even_one_fits_it_says_so_and_training_goes_on(
    shards: list[str], narrow: type[Narrow], micro_batch_size: int
) -> None:
    learner = narrow(seed=1)
    scoring = ScoringConfig(micro_batch_size=micro_batch_size)
    with dataset_of(shards, learner, lookahead=0, scoring=scoring) as dataset:
        iterator = iter(dataset)
        batch = next(iterator)
        narrow.most = 0
        with pytest.raises(ScoringMemoryError, match=r"one candidate at a time.*scoring_device="):
            next(iterator)
        train_step(learner, (batch["image"], batch["text"]))
        narrow.most = 1000
        again = next(iter(dataset))  # nothing was lost: the same candidates are read again
        assert dataset.metrics()["samples_read"] == 24
        train_step(learner, (again["image"], again["text"]))


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    shards: list[str], narrow: type[Narrow], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Narrow, image: Tensor) -> Tensor:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Narrow, "encode_image", broken)
    with dataset_of(shards, narrow(seed=1)) as dataset:
        with pytest.raises(RuntimeError, match="out of luck"):
            next(iter(dataset))
