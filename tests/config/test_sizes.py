"""Ratios become integers once, and change at the steps that were promised.

pytest tests/config/test_sizes.py
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor, tokenize
from support.shards import write_shards

from jest_stream import JESTDataset, SelectionConfig
from jest_stream.config.sizes import resolve_sizes
from jest_stream.errors import ConfigError, ResumeMismatchError

pytestmark = pytest.mark.usefixtures("no_leaks")


def sizes(batch_size: int = 256, ratio: Any = 0.8, given: int | None = None, **rule: Any) -> Any:
    return resolve_sizes(SelectionConfig(**rule), batch_size, ratio, given)


@pytest.mark.parametrize(
    ("batch_size", "ratio", "super_batch_size"),
    [
        (256, 0.8, 1280),
        (256, 0.95, 5120),  # int(256 / (1 - 0.95)) is 5119
        (32_768, 0.8, 163_840),
        (32_768, 0.9, 327_680),
        (100, 0.7, 333),
        (1, 0.0, 1),
    ],
)
def test_the_super_batch_is_the_rounded_quotient(
    batch_size: int, ratio: float, super_batch_size: int
) -> None:
    assert sizes(batch_size, ratio).changes == ((0, super_batch_size),)


def test_uniform_reads_a_batch_unless_a_super_batch_is_given() -> None:
    assert sizes(method="uniform").changes == ((0, 256),)
    assert sizes(method="uniform").stream_size == 1280
    assert sizes(method="uniform", given=512).changes == ((0, 512),)


@pytest.mark.parametrize(
    ("ratio", "start", "stop", "changes"),
    [
        (0.5, 0, None, ((0, 20),)),
        (0.5, 3, None, ((0, 10), (3, 20))),
        (0.5, 0, 9, ((0, 20), (9, 10))),
        ({0: 0.5, 50: 0.75}, 10, 90, ((0, 10), (10, 20), (50, 40), (90, 10))),
        ({0: 0.5, 5: 0.75}, 10, None, ((0, 10), (10, 40))),
        ({0: 0.5, 95: 0.75}, 10, 90, ((0, 10), (10, 20), (90, 10))),
    ],
)
def test_sizes_change_at_their_steps(
    ratio: Any, start: int, stop: int | None, changes: tuple[tuple[int, int], ...]
) -> None:
    found = sizes(10, ratio, start_step=start, stop_step=stop)
    assert found.changes == changes
    for step in range(100):
        assert found.at(step) == [size for first, size in changes if first <= step][-1]


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ({3: 0.5}, "filter_ratio must give the ratio from step 0 on"),
        ({0: 0.5, -1: 0.5}, "a step of filter_ratio must be an integer of at least 0, got -1"),
        ({0: 0.5, 7: 1.0}, r"filter_ratio must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(ratio: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sizes(10, ratio)


def test_a_stop_before_the_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="stop_step=4 is not after start_step=4"):
        SelectionConfig(start_step=4, stop_step=4)


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_a_run_reads_and_scores_what_the_schedule_says_and_resumes_in_it(
    tmp_path: Path, lookahead: int
) -> None:
    write_shards(tmp_path, num_shards=5, examples_per_shard=12)

    def jest(**options: Any) -> JESTDataset:
        defaults: dict[str, Any] = {
            "selection": SelectionConfig(start_step=1, stop_step=6),
            "filter_ratio": {0: 0.5, 4: 0.75},
        }
        return JESTDataset(
            f"{tmp_path}/*.tar",
            learner=TinyTwoTower(1),
            reference=TinyTwoTower(2),
            transform=to_tensor,
            tokenizer=tokenize,
            batch_size=4,
            lookahead=lookahead,
            as_dict=True,
            **{**defaults, **options},
        )

    dataset, read, keys, states = jest(), [], [], []
    assert "4 of 4, then 8, then 16, then 4" in repr(dataset)
    for batch in islice(dataset, 8):
        assert len(batch["key"]) == 4
        read.append(dataset.metrics()["samples_read"] - sum(read))
        keys.append(batch["key"])
        states.append(dataset.state_dict())
    assert read == [4, 8, 8, 8, 16, 16, 4, 4]
    assert dataset.metrics()["samples_scored"] == 3 * 8 + 2 * 16
    for step, state in enumerate(states, start=1):
        resumed = jest()
        resumed.load_state_dict(state)
        assert [batch["key"] for batch in islice(resumed, 8 - step)] == keys[step:]
    with pytest.raises(ResumeMismatchError, match="super_batch_size="):
        jest(filter_ratio=0.5).load_state_dict(states[0])
