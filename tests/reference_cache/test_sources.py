"""Every kind of source is cached and joined: tars, Parquet, datasets, from disk, web and Hub.

pytest tests/reference_cache/test_sources.py
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from support.cache_builds import NUM_SHARDS, PER_SHARD, build
from support.fault_server import FaultServer
from support.hub_server import HubServer, parquet_of
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor
from support.shards import draw, make_example, write_shards
from torch.nn import functional as F

from jest_stream import (
    HuggingFaceSource,
    ReferenceCache,
    StorageConfig,
    TarSource,
    open_source,
)
from jest_stream.errors import ReferenceMismatchError
from jest_stream.types import REFERENCE_ROW, Source
from jest_stream.views.decode import Decoded

SHARDS = {"num_shards": NUM_SHARDS, "examples_per_shard": PER_SHARD}

pytestmark = pytest.mark.usefixtures("no_leaks")

REFERENCE = TinyTwoTower(2)


def image_of(example: Any) -> Image.Image:
    decoded = Decoded(example)
    name = next(name for name in ("jpg", "image") if name in decoded)
    found: Image.Image = decoded[name]
    return found.convert("RGB")


def assert_joined(joined: Source, num_examples: int) -> None:
    """Demands that every example has the embeddings of its own picture."""
    found = 0
    for shard in range(joined.num_shards):
        for example, _ in joined.read(shard):
            assert isinstance(example, dict), example
            images, *_, row = example[REFERENCE_ROW]
            pixels = to_tensor(image_of(example))[None]
            live = F.normalize(REFERENCE.encode_image(pixels), dim=-1)[0]
            assert torch.allclose(images[row].float(), live, atol=1e-3)
            found += 1
    assert found == num_examples


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield server


def on(server: HubServer) -> StorageConfig:
    return StorageConfig(options={"hf": {"endpoint": server.url}})


def test_parquet_files_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    parts = [[make_example(10 * part + i) for i in range(10)] for part in range(3)]
    files = {f"train-{i:05d}.parquet": parquet_of(part) for i, part in enumerate(parts)}
    hub.put("acme/pairs", files)
    source = HuggingFaceSource("acme/pairs", storage=on(hub))
    cache = build(source, tmp_path / "cache", num_workers=1)
    assert [record.num_examples for record in cache.shards] == [10, 10, 10]
    assert_joined(cache.join(HuggingFaceSource("acme/pairs", storage=on(hub))), 30)
    hub.put("acme/pairs", {"train-00001.parquet": parquet_of(parts[1][:9])})
    with pytest.raises(ReferenceMismatchError, match="has changed since.*bytes, and has"):
        assert_joined(cache.join(HuggingFaceSource("acme/pairs", storage=on(hub))), 30)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_objects_of_datasets(tmp_path: Path, kind: str) -> None:
    pairs = [draw(index) for index in range(24)]
    columns = {"image": [image for image, _ in pairs], "text": [text for _, text in pairs]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(columns, features=features)
    dataset = table if kind == "map" else table.to_iterable_dataset(num_shards=3)
    cache = build(dataset, tmp_path / "cache")
    assert_joined(cache.join(open_source(dataset)), 24)


def test_a_cache_on_a_web_server_is_read(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "s")
    build(shards, tmp_path / "cache")
    with FaultServer(tmp_path) as server:
        cache = ReferenceCache(f"{server.address}/cache")
        assert_joined(cache.join(TarSource(shards)), 64)
        cache.close()


@pytest.mark.usefixtures("no_leaks")
def test_a_joined_source_can_be_sent_to_another_process(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "s")
    joined = build(shards, tmp_path / "cache").join(TarSource(shards))
    next(iter(joined.read(0)))
    assert_joined(pickle.loads(pickle.dumps(joined)), 64)
    assert joined.fingerprint == TarSource(shards).fingerprint
    assert joined.num_examples is None and "JoinedSource" in repr(joined)
