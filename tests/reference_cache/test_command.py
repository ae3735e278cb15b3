"""`jest-stream cache`, killed at any moment and started again, makes the same files.

pytest tests/reference_cache/test_command.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cache_builds import NUM_SHARDS, PER_SHARD, files_of
from support.clip_models import write_folder
from support.fault_server import FaultServer
from support.faults import Fault
from support.leaks import no_leaks  # noqa: F401
from support.remote import until
from support.s3_server import S3Server
from support.shards import write_shards

from jest_stream import ReferenceCache, StorageConfig
from jest_stream.cli import main

SHARDS = {"num_shards": NUM_SHARDS, "examples_per_shard": PER_SHARD}

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(400)]

NUM_SHARDS, PER_SHARD = 12, 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_folder(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, num_shards=NUM_SHARDS, examples_per_shard=PER_SHARD)
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, pattern: str, model: str
) -> dict[str, bytes]:
    """The files of a build that nobody disturbed."""
    out = tmp_path_factory.mktemp("expected") / "cache"
    assert main(arguments(pattern, model, out)) == 0
    return files_of(out)


def arguments(pattern: str, model: str, out: Any, *more: str) -> list[str]:
    sizes = ("--micro-batch-size", "4", *more)
    return ["cache", pattern, "--reference", model, "--out", str(out), *sizes]


def start(command: list[str], *, program: tuple[str, ...] = (), **options: Any) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("environment", {})}
    return subprocess.Popen(
        [*(program or (sys.executable, "-m", "jest_stream.cli")), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def finish(process: Any) -> tuple[str, str]:
    """Waits for its end; returns its output and its errors."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, f"{out}\n{err}"
    return out, err


def test_the_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["cache", "--help"])
    shown = capsys.readouterr().out
    assert "--reference open_clip:ViT-B-32/laion2b_s34b_b79k" in shown and "torchrun" in shown


def test_it_says_what_it_did(pattern: str, model: str, tmp_path: Path, expected: Any) -> None:
    out, err = finish(start(arguments(pattern, model, tmp_path / "c", "--num-workers", "2")))
    assert "12 shards, 288 examples of 32 dimensions, 0 left out" in out
    lines = err.strip().splitlines()
    assert lines[-2:][0].startswith("cache: 12 shards to embed")
    assert "12 of 12 shards, 288 examples" in lines[-1] and "0 s left" in lines[-1]
    assert files_of(tmp_path / "c") == expected


def test_an_error_is_status_1_and_says_what_to_do(
    pattern: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "c")
    for reference, message in (
        ("open_clip:ViT-B-32", "names no weights"),
        ("model.pt", "is no .safetensors file"),
        ("nowhere", "reference='nowhere' is no folder and names no model"),
    ):
        assert main(["cache", pattern, "--reference", reference, "--out", out]) == 1
        assert message in capsys.readouterr().err
    for device, message in (("gpu", "got 'gpu'"), ("cuda:99", "'cuda:99' cannot be used here: ")):
        command = ["cache", pattern, "--reference", model, "--out", out, "--device", device]
        assert main(command) == 1
        assert message in capsys.readouterr().err
    for where in ("https://example.org/c", "hf://datasets/a/b/c"):
        assert main(["cache", pattern, "--reference", model, "--out", where]) == 1
        assert "is only read. Write to a local folder, s3:// or gs://" in capsys.readouterr().err
    assert not Path(out).exists()


def test_embedding_in_half_precision_is_another_build(
    pattern: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(pattern, model, tmp_path / "c", "--dtype", "bfloat16")
    assert main(command) == 0
    assert ReferenceCache(tmp_path / "c").manifest.header.autocast_dtype == "torch.bfloat16"
    assert main(command[:-2]) == 1
    assert "autocast_dtype was 'torch.bfloat16', is None" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 3))])
def test_killed_at_random_moments_it_makes_the_same_files(
    pattern: str, model: str, tmp_path: Path, expected: dict[str, bytes], seed: int
) -> None:
    """Killed when a random number of shards is done; the last one may finish.

    The builds are forked: started anew, they would spend most of their time on imports.
    """
    draw, out = random.Random(seed), tmp_path / "cache"
    for _ in range(6):
        command = arguments(pattern, model, out, "--num-workers", draw.choice("01"))
        process = multiprocessing.get_context("fork").Process(target=main, args=(command,))
        process.start()
        target = num_done(out) + draw.randint(0, 3)
        wait_for(process.is_alive, out, min(target, NUM_SHARDS))
        if target < NUM_SHARDS:
            time.sleep(draw.random() * 0.02)  # anywhere within what comes next
            process.kill()
        process.join(60)
        process.close()
    assert main(arguments(pattern, model, out)) == 0
    assert files_of(out) == expected


def wait_for(is_alive: Callable[[], bool], folder: Path, number: int) -> None:
    """Waits until so many shards are done, or the build has ended."""
    until(lambda: not is_alive() or num_done(folder) >= number, limit_s=60)


def num_done(folder: Path) -> int:
    """Finished shards; not before the folder is claimed, so that a kill is never too early."""
    if not (folder / "build.json").exists():
        return -1
    return len(list(folder.glob("0*.json")))


def test_what_a_killed_build_left_half_written_is_removed(
    pattern: str, model: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    out = tmp_path / "cache"
    out.mkdir()
    (out / ".00003.arrow.0123456789abcdef.unfinished").write_bytes(b"half")
    assert main(arguments(pattern, model, out)) == 0
    assert files_of(out) == expected


def test_ctrl_c_is_status_130(pattern: str, model: str, tmp_path: Path) -> None:
    shards, out = Path(pattern).parent, tmp_path / "cache"
    size = max(path.stat().st_size for path in shards.iterdir())
    sixth = sorted(path.name for path in shards.iterdir())[5]
    with FaultServer(shards, (Fault("stall", path=sixth, after_bytes=size // 2),)) as server:
        command = arguments(server.url("*.tar"), model, out, "--num-workers", "1")
        process = start(command)
        wait_for(lambda: process.poll() is None, out, 5)  # it waits for the rest of the sixth now
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert num_done(out) == 5
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_two_ranks_of_torchrun_share_the_work(
    pattern: str, model: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    program = (*torchrun, "--nproc-per-node", "2", "-m", "jest_stream.cli")
    out, _ = finish(start(arguments(pattern, model, tmp_path / "cache"), program=program))
    assert "12 shards, 288 examples" in out
    assert files_of(tmp_path / "cache") == expected


@pytest.mark.slow
def test_an_object_store_gets_the_same_files_and_no_halves(
    s3: S3Server, pattern: str, model: str, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    bucket = s3.make_bucket()
    command = arguments(pattern, model, f"s3://{bucket}/a/cache")
    process = start(command, environment=s3.environment)
    storage = StorageConfig(options=s3.options)
    from jest_stream.storage.storage import Storage

    store = Storage(storage)
    until(
        lambda: (
            process.poll() is not None or "00003.json" in store.names_in(f"s3://{bucket}/a/cache")
        ),
        limit_s=60,
    )
    process.kill()
    process.communicate(timeout=60)
    out, _ = finish(start(command, environment=s3.environment))
    assert "288 examples" in out
    found = {}
    for name in store.names_in(f"s3://{bucket}/a/cache"):
        with store.open(f"s3://{bucket}/a/cache/{name}") as file:
            found[name] = file.read()
    store.close()
    assert found == expected
    manifest = json.loads(found["manifest.json"])
    assert manifest["num_examples"] == 288
