"""A batch of fewer examples than chunks is drawn one example at a time: the default fits any batch.

pytest tests/selection/test_small_batches.py
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.models import tiny_dataset
from support.selection_inputs import random_embeddings
from support.shards import write_shards

from jest_stream import SelectionConfig, select_jointly
from jest_stream.selection.joint import joint_selection


def select(**arguments: Any) -> list[int]:
    models = random_embeddings(90, seed=0), random_embeddings(90, seed=1)
    generator = torch.Generator().manual_seed(0)
    return select_jointly(*models, batch_size=7, generator=generator, **arguments).tolist()


@pytest.mark.parametrize("num_sweeps", [0, 2])
def test_the_default_of_sixteen_chunks_draws_seven_examples_one_by_one(num_sweeps: int) -> None:
    default = select(num_sweeps=num_sweeps)
    assert default == select(num_chunks=7, num_sweeps=num_sweeps)
    assert default != select(num_chunks=6, num_sweeps=num_sweeps)  # else the test would see nothing


@pytest.mark.parametrize("num_sweeps", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_no_chunk_is_empty(batch_size: int, num_sweeps: int) -> None:
    selection = joint_selection(
        random_embeddings(20, seed=0),
        random_embeddings(20, seed=1),
        batch_size=batch_size,
        num_chunks=1000,
        num_sweeps=num_sweeps,
        key=0,
        step=0,
    )
    assert selection.effective_support.shape == (batch_size,)
    assert selection.indices.unique().numel() == batch_size


@pytest.mark.parametrize("num_sweeps", [0, 2])
@pytest.mark.usefixtures("no_leaks")
def test_a_dataset_does_the_same(tmp_path: Path, num_sweeps: int) -> None:
    shards = write_shards(tmp_path, num_shards=2, examples_per_shard=30)

    def keys(**rule: Any) -> list[list[str]]:
        rules = SelectionConfig(num_sweeps=num_sweeps, **rule)
        with tiny_dataset(shards, batch_size=7, super_batch_size=20, selection=rules) as dataset:
            return [batch["key"] for batch in islice(dataset, 3)]

    assert keys() == keys(num_chunks=7) != keys(num_chunks=1)
