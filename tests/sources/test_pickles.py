"""Pickles are bytes, in tables and when read by `datasets`: no path into a batch opens one.

pytest tests/sources/test_pickles.py
"""

from __future__ import annotations

import base64
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torch
import tqdm
from pyarrow import parquet
from support.hub_server import HubServer, tar_of
from support.live_pickles import WRITERS, jest, pickled
from support.models import to_tensor
from support.remote import nothing_survives  # noqa: F401
from support.shards import draw, encode, make_example, members, write_tar

from jest_stream.config.storage import StorageConfig
from jest_stream.errors import BadExampleError, ConfigError, ShardError, UnsafeDataError
from jest_stream.sources import open_source
from jest_stream.sources.huggingface import HuggingFaceSource
from jest_stream.sources.iterable import IterableSource

WORKERS = [0, 2]
NUM_ROWS = 12
REFUSED = (UnsafeDataError, BadExampleError, ConfigError)


@pytest.fixture(autouse=True)
def no_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread that stays: `datasets` formats values under progress bars."""
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)


READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("pkl", "pickle", "pyd"), pickle.load),
    **dict.fromkeys(("pth", "pt"), lambda stream: torch.load(stream, weights_only=False)),
    "npy": lambda stream: np.load(stream, allow_pickle=True),
    "npz": lambda stream: np.load(stream, allow_pickle=True)["arr_0"],
}


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that must not be there at the end, whatever was read."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "a pickle was opened"


@pytest.fixture
def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles by kind, each of them live: opened by hand, it creates the canary."""
    found = {}
    for kind in WRITERS:
        found[kind] = pickled(canary, kind)
        assert not canary.exists()
        READERS[kind](io.BytesIO(found[kind]))
        assert canary.exists(), f"the {kind} is not live"
        canary.unlink()
    return found


def num_read(source: Any, **options: Any) -> int:
    """Returns how many batches there are, everything being decoded."""
    with jest(source, **options) as dataset:
        return len(list(dataset))


def assert_refused(source: Any, kinds: Any = REFUSED, **options: Any) -> None:
    """Nothing is read: the first batch is an error."""
    with pytest.raises(kinds):
        num_read(source, **options)


def image_struct(data: list[bytes]) -> Any:
    type_ = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array([{"bytes": each, "path": None} for each in data], type_)


def columns(payloads: dict[str, bytes]) -> dict[str, Any]:
    """A good image and text in each row, and a pickle of every kind beside them."""
    images = [encode(draw(index)[0], "png") for index in range(NUM_ROWS)]
    rows: dict[str, Any] = {
        "image": image_struct(images),
        "text": [draw(index)[1] for index in range(NUM_ROWS)],
    }
    for kind, data in payloads.items():
        rows[kind] = pyarrow.array([data] * NUM_ROWS, pyarrow.binary())
        rows[f"image.{kind}"] = rows[kind]
    return rows


def written(table: Any) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    return stream.getvalue()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def repository(hub: HubServer) -> Iterator[Callable[..., HuggingFaceSource]]:
    """Makes the source of a repository of one Parquet file."""
    made: list[HuggingFaceSource] = []

    def make(table: Any, **options: Any) -> HuggingFaceSource:
        hub.put("acme/pairs", {"train-0.parquet": written(table)})
        storage = StorageConfig(retry_timeout_s=5, options={"hf": {"endpoint": hub.url}})
        made.append(HuggingFaceSource("acme/pairs", storage=storage, **options))
        return made[-1]

    yield make
    for source in made:
        source.close()


@pytest.mark.parametrize("num_workers", WORKERS)
def test_of_a_table_of_the_hub_beside_what_is_read(
    payloads: dict[str, bytes], repository: Callable[..., HuggingFaceSource], num_workers: int
) -> None:
    source = repository(pyarrow.table(columns(payloads)))
    assert num_read(source, num_workers=num_workers, filter_ratio=0.0) == NUM_ROWS // 2
    assert not any(set(step[0]) & set(payloads) for step in source.read(0))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("role", ["image_key", "text_key"])
def test_of_a_table_of_the_hub_named_as_what_is_read(
    payloads: dict[str, bytes],
    repository: Callable[..., HuggingFaceSource],
    role: str,
    num_workers: int,
) -> None:
    table = pyarrow.table(columns(payloads))
    for kind in payloads:
        for name in (kind, f"image.{kind}"):
            assert_refused(repository(table, **{role: name}), num_workers=num_workers)
            assert_refused(repository(table), num_workers=num_workers, **{role: name})


@pytest.mark.parametrize("is_struct", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_of_a_table_as_the_bytes_of_images(
    payloads: dict[str, bytes],
    repository: Callable[..., HuggingFaceSource],
    kind: str,
    is_struct: bool,
) -> None:
    data = [payloads[kind]] * NUM_ROWS
    image = image_struct(data) if is_struct else pyarrow.array(data, pyarrow.binary())
    source = repository(pyarrow.table({"image": image, "text": ["a"] * NUM_ROWS}))
    assert_refused(source, BadExampleError)
    assert_refused(source, BadExampleError, train_transform=to_tensor)
    with jest(source, on_bad_example="skip", batch_size=1) as dataset:
        with pytest.raises(ConfigError, match="gives this rank 0 examples"):
            list(dataset)


EXTENSIONS = [
    "arrow.py_extension_type",  # unpickled by Arrow before version 14 (CVE-2023-47248)
    "datasets.features.features.Array2DExtensionType",
    "arrow.opaque",
    "arrow.fixed_shape_tensor",
]


@pytest.mark.parametrize("column", ["image", "text", "other"])
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_of_a_table_as_metadata_of_types(
    payloads: dict[str, bytes],
    repository: Callable[..., HuggingFaceSource],
    extension: str,
    column: str,
) -> None:
    metadata = {"ARROW:extension:name": extension, "ARROW:extension:metadata": payloads["pkl"]}
    table = pyarrow.table(
        {**columns({}), "other": pyarrow.array([b"x"] * NUM_ROWS, pyarrow.binary())}
    )
    fields = [
        field.with_metadata(metadata) if field.name == column else field for field in table.schema
    ]
    table = table.cast(pyarrow.schema(fields))
    stored = re.search(rb"ARROW:schema.{1,9}?([A-Za-z0-9+/]{99,}=*)", written(table), re.DOTALL)
    assert stored and payloads["pkl"] in base64.b64decode(stored[1])
    if extension == "arrow.py_extension_type":  # nobody knows it any more
        assert num_read(repository(table), filter_ratio=0.0) == NUM_ROWS // 2
        return
    with pytest.raises(ShardError, match="is damaged"):
        repository(table)


@pytest.mark.parametrize("key", [b"pandas", b"huggingface", b"pickle", b"PANDAS_ATTRS"])
def test_of_a_table_as_metadata_of_the_schema(
    payloads: dict[str, bytes], repository: Callable[..., HuggingFaceSource], key: bytes
) -> None:
    table = pyarrow.table(columns({})).replace_schema_metadata({key: payloads["pkl"]})
    assert num_read(repository(table), filter_ratio=0.0) == NUM_ROWS // 2


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Streams local files by `datasets`, without its cache or the network."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def stream(kind: str, *paths: str, **options: Any) -> Any:
        return datasets.load_dataset(
            kind,
            data_files=list(paths),
            split="train",
            streaming=True,
            cache_dir=str(tmp_path / "cache"),
            **options,
        )

    return stream


@pytest.mark.parametrize("num_workers", WORKERS)
def test_of_a_local_table_streamed_by_datasets(
    payloads: dict[str, bytes], load: Callable[..., Any], tmp_path: Path, num_workers: int
) -> None:
    path = tmp_path / "pairs.parquet"
    path.write_bytes(written(pyarrow.table(columns(payloads))))
    stream = load("parquet", str(path))
    options = {"num_workers": num_workers}
    source = HuggingFaceSource(stream, image_key="image", text_key="text")
    assert num_read(source, filter_ratio=0.0, **options) == NUM_ROWS // 2
    for kind in payloads:
        assert_refused(HuggingFaceSource(stream, image_key=kind), **options)
        assert_refused(HuggingFaceSource(stream, image_key="image", text_key=kind), **options)
        assert_refused(source, image_key=kind, **options)


OBJECTS: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "a table": datasets.Dataset.from_list,
    "a stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2),
    "a generator": lambda rows: datasets.IterableDataset.from_generator(
        lambda part: iter(part), gen_kwargs={"part": rows}
    ),
    "with a format": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_of_an_object_of_datasets(payloads: dict[str, bytes], name: str) -> None:
    rows = [{**make_example(index), **payloads} for index in range(NUM_ROWS)]
    rows = [{**row, "txt": row["txt"].decode()} for row in rows]
    handed = OBJECTS[name](rows)
    good = HuggingFaceSource(handed, image_key="jpg", text_key="txt")
    assert num_read(good, filter_ratio=0.0) == NUM_ROWS // 2
    for kind in payloads:
        assert_refused(HuggingFaceSource(handed, image_key=kind, text_key="txt"))
        assert_refused(HuggingFaceSource(handed, image_key="jpg", text_key=kind))
        own = IterableSource(handed)  # its examples as they are
        for options in (
            {"image_key": kind},
            {"text_key": kind},
            {"text_key": lambda example, kind=kind: str(example[kind])},
        ):
            assert_refused(own, **options)


def harmless(kind: str) -> bytes:
    """Returns a file of the kind that `datasets` opens without complaint."""
    stream = io.BytesIO()
    if kind in ("pth", "pt"):
        torch.save({"a": torch.zeros(1)}, stream)
    elif kind == "npy":
        np.save(stream, np.zeros(1))
    elif kind == "npz":
        np.savez(stream, np.zeros(1))
    return stream.getvalue()


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("kind", WRITERS)
def test_of_a_tar_streamed_by_datasets(
    payloads: dict[str, bytes],
    load: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    num_workers: int,
) -> None:
    """It opens some kinds itself, without pickles, and raises its own error for the others.

    Here the first examples are good, since it opens five when the dataset is made.
    """
    examples = [
        {**make_example(index), kind: harmless(kind) if index < 8 else payloads[kind]}
        for index in range(NUM_ROWS)
    ]
    shard = write_tar(tmp_path / "0.tar", members(examples))
    stream = load("webdataset", shard)
    options = {"num_workers": num_workers, "filter_ratio": 0.0}
    if kind in ("npy", "npz", "pth"):
        with pytest.raises((ValueError, pickle.UnpicklingError), match="allow_pickle|Weights only"):
            num_read(stream, **options)
        return
    assert num_read(stream, **options) == NUM_ROWS // 2
    assert_refused(stream, image_key=kind, **options)
    assert_refused(stream, text_key=kind, **options)


def test_of_a_tar_that_datasets_would_open_by_an_old_torch(
    load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "0.tar", members([make_example(index) for index in range(8)]))
    stream = load("webdataset", shard)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.5.1"))
    with pytest.raises(UnsafeDataError, match="before 2.6, here 2.5.1.*the paths of the tars"):
        open_source(stream)
    with pytest.raises(UnsafeDataError):
        open_source(stream.map(lambda row: row))
    assert num_read(shard, filter_ratio=0.0) == 4


@pytest.mark.parametrize("kind", WRITERS)
def test_of_a_tar_of_the_hub_read_here(
    payloads: dict[str, bytes], hub: HubServer, kind: str
) -> None:
    examples = [{**make_example(index), kind: payloads[kind]} for index in range(NUM_ROWS)]
    hub.put("acme/tars", {"train-0.tar": tar_of(examples)})
    storage = StorageConfig(retry_timeout_s=5, options={"hf": {"endpoint": hub.url}})
    source = open_source("hf://datasets/acme/tars", storage=storage)
    assert num_read(source, filter_ratio=0.0) == NUM_ROWS // 2
    assert_refused(source, UnsafeDataError if kind != "npy" else BadExampleError, image_key=kind)
    source.close()  # type: ignore[attr-defined]
