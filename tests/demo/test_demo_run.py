"""The demo runs end to end on its own data and writes its findings down."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch
from PIL import Image
from support.leaks import no_leaks  # noqa: F401

from jest_stream.demo import data
from jest_stream.demo.run import run_demo
from jest_stream.errors import ConfigError
from jest_stream.sources.tar import TarSource


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def demo_shards(cache_dir):
    return data.unpack(cache_dir)


def test_the_pool_unpacks_to_shards_once(demo_shards, cache_dir):
    assert len(demo_shards) >= 20
    before = [os.stat(path).st_mtime_ns for path in demo_shards]
    assert data.unpack(cache_dir) == demo_shards
    assert [os.stat(path).st_mtime_ns for path in demo_shards] == before
    assert len(os.listdir(cache_dir)) == 1  # nothing half-written is left


def test_shards_hold_picture_caption_and_origin(demo_shards):
    example, _ = next(TarSource(demo_shards).read(0))
    assert {"webp", "txt", "json"} <= example.keys()
    assert json.loads(example["json"]).keys() == {"set", "family", "category", "licence"}


def test_two_runs_may_unpack_at_once(tmp_path, monkeypatch):
    rows = list(data._rows(("pool",)))[: data.NUM_SHARDS]
    barrier = threading.Barrier(2, timeout=30)

    def both_are_writing(roles):
        barrier.wait()
        return iter(rows)

    monkeypatch.setattr(data, "_rows", both_are_writing)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(data.unpack(tmp_path))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2 and found[0] == found[1] and len(found[0]) == data.NUM_SHARDS
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.usefixtures("no_leaks")
def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        data.unpack(tmp_path / "file")


def test_the_default_cache_is_the_user_s(tmp_path, monkeypatch, demo_shards):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data._user_cache() == tmp_path / "jest_stream"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data._user_cache() == tmp_path / ".cache" / "jest_stream"


def test_a_short_demo_writes_table_plot_and_results(demo_shards, cache_dir, tmp_path, capsys):
    random_state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    out = tmp_path / "new" / "folder"
    returned = run_demo(steps=2, seed=3, out=out, filter_ratio=0.5, cache_dir=cache_dir)

    results = json.loads((out / "results.json").read_text())
    assert results == returned
    assert results["settings"]["seed"] == 3 and results["settings"]["filter_ratio"] == 0.5
    uniform, jest = (results["curves"][name][-1] for name in ("uniform", "JEST"))
    assert uniform["trained"] == jest["trained"] == 512
    assert uniform["scored"] == 0
    assert jest["scored"] == 3 * 512  # two steps, and the super-batch in flight
    assert jest["flops"] > uniform["flops"] > 0 and uniform["seconds"] > 0
    assert set(uniform["accuracy"]) == {"emoji", "others"}

    printed = capsys.readouterr().out
    assert "JEST, equal FLOPs" in printed and "too short a run to tell" in printed
    assert "uniform: step 2, " in printed
    assert "JEST, equal wall time" in (out / "summary.md").read_text()
    with Image.open(out / "curves.png") as plot:
        assert plot.format == "PNG" and plot.width > 1000

    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == num_threads


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1, "filter_ratio": 1.5}, "filter_ratio must be in"),
    ],
)
def test_settings_that_cannot_work_are_named(arguments, message, demo_shards, cache_dir, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_demo(out=tmp_path, cache_dir=cache_dir, **arguments)


@pytest.mark.usefixtures("no_leaks")
def test_an_output_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match="taken"):
        run_demo(steps=1, out=tmp_path / "taken")


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no usable GPU"):
        run_demo(steps=1, out=tmp_path, device="cuda")
