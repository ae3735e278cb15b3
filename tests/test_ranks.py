"""Two ranks read disjoint halves of the stream that one rank reads whole.

pytest tests/test_ranks.py
"""

from __future__ import annotations

from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
import torch.multiprocessing
from leaks import no_leaks  # noqa: F401
from models import TinyTwoTower, to_tensor, tokenize
from shards import write_shards

from jest_stream import JESTDataset, SelectionConfig
from jest_stream.errors import ConfigError, ResumeMismatchError

pytestmark = pytest.mark.usefixtures("no_leaks")

UNIFORM = SelectionConfig(method="uniform")


def jest(shards: Any, batch_size: int, **options: Any) -> JESTDataset:
    return JESTDataset(
        shards,
        transform=to_tensor,
        tokenizer=tokenize,
        batch_size=batch_size,
        filter_ratio=0.5,
        as_dict=True,
        **options,
    )


def work(rank: int, folder: str, shards: list[str]) -> None:
    """One rank: reads, then tries what must be refused."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    try:
        dataset = jest(shards, 4, selection=UNIFORM)
        keys = [batch["key"] for batch in islice(dataset, 6)]
        learner = jest(shards, 4, learner=TinyTwoTower(1), reference=TinyTwoTower(2))
        assert len(next(iter(learner))["key"]) == 4
        torch.save({"keys": keys, "state": dataset.state_dict()}, f"{folder}/{rank}.pt")
        torch.distributed.barrier()
        other = torch.load(f"{folder}/{1 - rank}.pt", weights_only=True)
        with pytest.raises(ResumeMismatchError, match="Load on each rank the state that it saved"):
            jest(shards, 4, selection=UNIFORM).load_state_dict(other["state"])
        with pytest.raises(ConfigError, match="2 ranks need at least 2 shards"):
            next(iter(jest(shards[:1], 4, selection=UNIFORM)))
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_share_out_the_stream_of_one(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", num_shards=6, examples_per_shard=12)
    torch.multiprocessing.spawn(work, args=(str(tmp_path), shards), nprocs=2)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    one = [batch["key"] for batch in islice(jest(shards, 8, selection=UNIFORM), 6)]
    for step in range(6):
        halves = [set(saved[rank]["keys"][step]) for rank in range(2)]
        assert not halves[0] & halves[1]
    together = {key for state in saved for batch in state["keys"] for key in batch}
    assert together == {key for batch in one for key in batch}
    with pytest.raises(ResumeMismatchError, match="of rank 0 of 2 .* this is rank 0 of 1, which"):
        jest(shards, 8, selection=UNIFORM).load_state_dict(saved[0]["state"])
    with pytest.raises(ResumeMismatchError, match="batch_size=4 on each of 2 ranks, 8 in all"):
        jest(shards, 4, selection=UNIFORM).load_state_dict(saved[0]["state"])
