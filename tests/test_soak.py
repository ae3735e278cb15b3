"""Memory, descriptors and threads stay flat in long runs; the demo runs from nothing.

pytest -m slow tests/test_soak.py
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import psutil
import pytest
from support.models import TinyTwoTower, to_tensor, tokenize, train_step
from support.shards import write_shards

from jest_stream import JESTDataset

pytestmark = pytest.mark.slow


NUM_STEPS = 10_000


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_descriptors_and_threads_stay_flat(tmp_path: Path, num_workers: int) -> None:
    shards = write_shards(tmp_path, num_shards=4, examples_per_shard=64, size=8)
    learner, process = TinyTwoTower(1), psutil.Process()
    with JESTDataset(
        shards,
        learner=learner,
        reference=TinyTwoTower(2),
        transform=to_tensor,
        tokenizer=tokenize,
        batch_size=4,
        super_batch_size=8,
        num_workers=num_workers,
    ) as dataset:
        seen = []
        for step, batch in enumerate(islice(dataset, NUM_STEPS), start=1):
            if step % 10 == 0:  # training is always the same work, and half the time of the test
                train_step(learner, batch)
            if step % 1000 == 0:
                dataset.state_dict()
                dataset.metrics()
                gc.collect()
                seen.append(
                    (process.memory_info().rss, process.num_fds(), threading.active_count())
                )
    assert len(seen) == NUM_STEPS // 1000
    assert len({(num_fds, num_threads) for _, num_fds, num_threads in seen[1:]}) == 1
    growth = seen[-1][0] - seen[1][0]
    assert growth < 8 << 20, f"{growth:,} bytes in 8,000 steps: 1 KB a step"


@pytest.mark.timeout(600)
def test_the_demo_runs_from_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from jest_stream.cli import main; raise SystemExit(main())"]
    done = subprocess.run(
        [*command, "demo", "--steps", "60", "--out", "results"],
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr
    assert "JEST, equal wall time" in done.stdout
    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert set(results["curves"]) == {"uniform", "JEST"}
    assert (tmp_path / "results" / "curves.png").stat().st_size > 10_000
