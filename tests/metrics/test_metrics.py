"""Counters add up, last values are read late, times do not overlap.

Run: pytest tests/metrics/test_metrics.py
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from jest_stream.metrics.metrics import Metrics, shared_out
from jest_stream.types import Selection

STAGES = ("data", "scoring", "selecting", "yielding", "training")


def selection_of(score: float) -> Selection:
    return Selection(
        indices=torch.tensor([1, 0]),
        weights=torch.ones(2),
        effective_support=torch.tensor([3.0, 5.0]),
        selected_score=torch.tensor(score),
        candidate_score=torch.tensor(0.5),
        group_counts=torch.zeros(0, dtype=torch.int64),
        quota_excess=torch.zeros(0, dtype=torch.int64),
        is_finite=torch.tensor(True),
    )


def test_a_short_run_as_a_flat_dict():
    metrics = Metrics()
    for step in range(3):
        metrics.count("samples_read", 10)
        metrics.count("samples_scored", 10)
        metrics.count("samples_trained", 2)
        metrics.count("steps")
        metrics.observe(selection_of(step), staleness=step)
    metrics.count_skipped("missing_text", 4)
    metrics.count_skipped("bad_image")
    metrics.count_skipped("missing_text")
    got = metrics.as_dict()
    times = {f"{stage}_s": got.pop(f"{stage}_s") for stage in STAGES}
    flops = {name: got.pop(name) for name in list(got) if name.startswith("flops_")}
    assert got == {
        "steps": 3,
        "samples_read": 30,
        "samples_scored": 30,
        "samples_trained": 6,
        "samples_skipped": 6,
        "skipped/bad_image": 1,
        "skipped/missing_text": 5,
        "epoch_tail": 0,
        "epoch_abandoned": 0,
        "super_batch_duplicates": 0,
        "staleness": 2,
        "effective_support": 4.0,  # mean over the chunks of the last sub-batch
        "selected_score": 2.0,
        "candidate_score": 0.5,
    }
    assert set(times.values()) == {0.0}
    ratios = {"flops_ratio", "flops_ratio_with_reuse"}
    assert {name for name, value in flops.items() if math.isnan(value)} == ratios
    assert all(flops[name] == 0 for name in flops.keys() - ratios)


def test_the_keys_are_there_before_the_first_batch():
    before = Metrics().as_dict()
    metrics = Metrics()
    metrics.observe(selection_of(1.0))
    assert set(before) == set(metrics.as_dict())
    assert all(math.isnan(before[name]) for name in ("staleness", "selected_score"))
    assert all(type(value) in (int, float) for value in metrics.as_dict().values())


def test_tensors_are_read_only_when_asked_for():
    metrics = Metrics()
    score = torch.tensor(1.0)
    selection = selection_of(0.0)
    metrics.observe(replace(selection, selected_score=score))
    score.fill_(7.0)  # as a kernel that was only enqueued would
    assert metrics.as_dict()["selected_score"] == 7.0


def test_nested_stages_add_up_to_the_time_that_passed():
    metrics = Metrics()
    start = time.perf_counter()
    with metrics.timed("scoring"):
        spin(0.02)
        with metrics.timed("data"):
            spin(0.05)
        spin(0.02)
    total = time.perf_counter() - start
    got = metrics.as_dict()
    assert got["data_s"] >= 0.05
    assert got["scoring_s"] >= 0.04
    # Were the inner time counted twice, the sum would exceed the total by 0.05.
    assert got["data_s"] + got["scoring_s"] == pytest.approx(total, abs=0.01)


def test_a_stage_that_fails_is_timed_and_ended():
    metrics = Metrics()
    with pytest.raises(KeyError), metrics.timed("selecting"):
        raise KeyError
    spent = metrics.as_dict()["selecting_s"]
    spin(0.01)
    assert 0 < metrics.as_dict()["selecting_s"] == spent


def test_counters_go_on_after_a_resume():
    metrics = Metrics()
    metrics.count("steps", 5)
    metrics.count_skipped("bad_image", 2)
    state = metrics.state_dict()
    metrics.count("steps")  # the saved state does not change
    state = json.loads(json.dumps(state))
    resumed = Metrics()
    resumed.load_state_dict(state)
    resumed.count("steps")
    resumed.count_skipped("bad_image")
    assert resumed.as_dict()["steps"] == 6
    assert resumed.as_dict()["skipped/bad_image"] == 3
    assert state["steps"] == 5


def test_groups_are_counted_with_what_they_miss_and_go_on_after_a_resume():
    metrics = Metrics(groups=["sw", ("en", 2)])
    metrics.count_groups([3, 1], [0, -2])
    metrics.count_groups([4, 9], [1, 4])
    expected = {
        "selected/sw": 7,
        "selected/('en', 2)": 10,
        "quota_shortfall/sw": 0,
        "quota_shortfall/('en', 2)": 2,
        "quota_overrun/sw": 1,
        "quota_overrun/('en', 2)": 4,
    }
    assert expected.items() <= metrics.as_dict().items()
    resumed = Metrics(groups=["sw", "new"])
    resumed.load_state_dict(json.loads(json.dumps(metrics.state_dict())))
    resumed.count_groups([1, 1], [0, 0])
    assert resumed.as_dict()["selected/sw"] == 8 and resumed.as_dict()["selected/new"] == 1


def test_what_a_source_counts_is_shown_and_goes_on_after_a_resume():
    metrics = Metrics()
    metrics.count_source({"storage_bytes": 100, "storage_retries": 1})
    metrics.count_source({"storage_bytes": 11})
    resumed = Metrics()
    resumed.load_state_dict(metrics.state_dict())
    resumed.count_source({"storage_bytes": 9, "cache_hits": 1})
    expected = {"storage_bytes": 120, "storage_retries": 1, "cache_hits": 1}
    assert expected.items() <= resumed.as_dict().items()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_other_ranks_share_out_what_was_counted(world_size):
    states = []
    for samples in (10, 7, 12):
        metrics = Metrics(groups=["a"])
        metrics.count("steps", 5)
        metrics.count("samples_read", samples)
        metrics.count_skipped("missing_text", samples)
        metrics.count_source({"storage_bytes": samples})
        metrics.count_groups([samples], [-samples])
        states.append(metrics.state_dict())
    shares = [shared_out(states, rank=rank, world_size=world_size) for rank in range(world_size)]
    counted = ("samples_read", "skipped/missing_text", "storage_bytes", "quota_shortfall/a")
    for name in counted:
        assert sum(share[name] for share in shares) == 29
        assert max(share[name] for share in shares) - min(share[name] for share in shares) <= 1
    assert {share["steps"] for share in shares} == {5}


def test_an_unknown_counter_or_stage_is_an_error():
    metrics = Metrics()
    with pytest.raises(KeyError, match="sample_red"):
        metrics.count("sample_red")
    with pytest.raises(KeyError, match="sleeping"), metrics.timed("sleeping"):
        pass


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
