"""Two ranks read disjoint halves of the stream that one rank reads whole.

pytest tests/test_ranks.py
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor, tokenize
from support.ranks import on_ranks
from support.shards import write_shards

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


def read_on_a_rank(shards: list[str]) -> dict[str, Any]:
    """Reads, then tries what must be refused."""
    dataset = jest(shards, 4, selection=UNIFORM)
    keys = [batch["key"] for batch in islice(dataset, 6)]
    learner = jest(shards, 4, learner=TinyTwoTower(1), reference=TinyTwoTower(2))
    assert len(next(iter(learner))["key"]) == 4
    states: list[Any] = [None, None]
    torch.distributed.all_gather_object(states, dataset.state_dict())
    other = states[1 - torch.distributed.get_rank()]
    with pytest.raises(ResumeMismatchError, match="Load on each rank the state that it saved"):
        jest(shards, 4, selection=UNIFORM).load_state_dict(other)
    with pytest.raises(ConfigError, match="2 ranks need at least 2 shards"):
        next(iter(jest(shards[:1], 4, selection=UNIFORM)))
    return {"keys": keys, "state": dataset.state_dict()}


def test_two_ranks_share_out_the_stream_of_one(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", num_shards=6, examples_per_shard=12)
    saved = on_ranks(2, tmp_path, read_on_a_rank, shards)
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
