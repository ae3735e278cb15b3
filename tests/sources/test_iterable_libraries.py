"""Datasets of torch and pipelines of webdataset, as they are, are sources of a `JESTDataset`.

pytest tests/sources/test_iterable_libraries.py
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from PIL import Image
from support.leaks import no_leaks
from support.models import TinyTwoTower, to_tensor, tokenize
from support.shards import make_example, write_shards
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from jest_stream import JESTDataset, SelectionConfig
from jest_stream.config.storage import StorageConfig
from jest_stream.errors import BadExampleError, ConfigError
from jest_stream.sources import open_source
from jest_stream.sources.huggingface import HuggingFaceSource
from jest_stream.sources.iterable import IterableSource
from jest_stream.sources.tar import TarSource

__all__ = ["no_leaks"]
# webdataset leaves files for the collector to close, with a warning.
pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NUM_EXAMPLES = 24
KEYS = [f"{index:06d}" for index in range(NUM_EXAMPLES)]
Make = Callable[[list[str]], Any]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, num_shards=2, examples_per_shard=NUM_EXAMPLES // 2)


class Pairs(Dataset[Any]):
    """Map-style, of decoded pictures and captions."""

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        example = make_example(index)
        return Image.open(io.BytesIO(example["jpg"])), example["txt"].decode()


class Stream(IterableDataset[Any]):
    """Of encoded examples; asks, as it should, which worker it is in."""

    def __iter__(self) -> Iterator[Any]:
        assert torch.utils.data.get_worker_info() is None
        return map(make_example, range(NUM_EXAMPLES))


def web_dataset(paths: list[str]) -> Any:
    return webdataset.WebDataset(paths, shardshuffle=False)


def data_pipeline(paths: list[str]) -> Any:
    return webdataset.DataPipeline(
        webdataset.SimpleShardList(paths),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
    )


# How it is made                                                 whether it gives keys of its own
LIBRARIES: dict[str, tuple[Make, bool]] = {
    "WebDataset": (web_dataset, True),
    "WebDataset, decoded": (lambda paths: web_dataset(paths).decode("pil"), True),
    "WebDataset, tuples": (lambda paths: web_dataset(paths).to_tuple("jpg", "txt"), False),
    "DataPipeline": (data_pipeline, True),
    "IterableDataset": (lambda paths: Stream(), True),
    "Dataset": (lambda paths: Pairs(), False),
    "Subset": (lambda paths: Subset(Pairs(), range(NUM_EXAMPLES)), False),
    "ConcatDataset": (
        lambda paths: ConcatDataset([Subset(Pairs(), range(9)), Subset(Pairs(), range(9, 24))]),
        False,
    ),
}


def dataset(source: Any, **options: Any) -> JESTDataset:
    settings: dict[str, Any] = {
        "learner": TinyTwoTower(seed=1),
        "transform": to_tensor,
        "tokenizer": tokenize,
        "batch_size": 4,
        "super_batch_size": 4,
        "selection": SelectionConfig(method="uniform"),
        "repeat": False,
        "as_dict": True,
        **options,
    }
    return JESTDataset(source, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_example_arrives_once(paths: list[str], library: str, num_workers: int) -> None:
    make, has_keys = LIBRARIES[library]
    with dataset(make(paths), num_workers=num_workers) as stream:
        keys = [key for batch in stream for key in batch["key"]]
    assert sorted(keys) == (KEYS if has_keys else sorted(map(str, range(NUM_EXAMPLES))))


def contents(batches: Any) -> list[Any]:
    return [(batch["key"], batch["image"].tolist(), batch["text"].tolist()) for batch in batches]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_resumed_run_goes_on_where_it_was(paths: list[str], library: str) -> None:
    make, _ = LIBRARIES[library]
    with dataset(make(paths), repeat=True) as stream:
        expected = contents(islice(stream, 9))
    with dataset(make(paths), repeat=True) as stream:
        begun = contents(islice(stream, 4))
        state = stream.state_dict()
    with dataset(make(paths), repeat=True, num_workers=1) as stream:
        stream.load_state_dict(state)
        assert begun + contents(islice(stream, 5)) == expected


def test_batches_of_a_pipeline_are_refused_with_what_to_do(paths: list[str]) -> None:
    batched = web_dataset(paths).decode("torchrgb").to_tuple("jpg", "txt").batched(4)
    with (
        dataset(batched) as stream,
        pytest.raises(ConfigError, match="looks like batches.*before batching"),
    ):
        next(iter(stream))


def test_tensors_without_a_text_are_refused_by_name() -> None:
    with (
        dataset(TensorDataset(torch.zeros(9, 3, 8, 8))) as stream,
        pytest.raises(ConfigError, match=r"a tuple of 1 at position 0, but an example is a dict"),
    ):
        next(iter(stream))


def test_a_pipeline_without_images_is_a_bad_example(paths: list[str]) -> None:
    with (
        dataset(web_dataset(paths).rename(picture="jpg")) as stream,
        pytest.raises(BadExampleError, match="no member for image_key"),
    ):
        next(iter(stream))


def generate() -> Iterator[Any]:
    yield from map(make_example, range(NUM_EXAMPLES))


def test_a_generator_gives_one_pass_and_its_second_says_what_to_pass() -> None:
    with dataset(generate()) as stream:
        assert len(list(stream)) == NUM_EXAMPLES // 4
        with pytest.raises(ConfigError, match=r"gives its examples once.*whose __iter__ calls"):
            next(iter(stream))
    with dataset(generate(), repeat=True) as stream:
        with pytest.raises(ConfigError, match="For a single pass use repeat=False"):
            list(islice(stream, NUM_EXAMPLES))


def test_a_generator_function_that_was_not_called_is_named() -> None:
    with pytest.raises(ConfigError, match="If it makes one when called, call it"):
        open_source(generate)


def test_an_iterable_is_for_one_rank(paths: list[str]) -> None:
    assert open_source(web_dataset(paths)).num_shards == 1


def test_storage_is_for_addresses_only(paths: list[str], tmp_path: Path) -> None:
    config = StorageConfig(cache_folder=str(tmp_path))
    assert isinstance(open_source(paths, storage=config), TarSource)
    for source in (Pairs(), TarSource(paths), web_dataset(paths)):
        with pytest.raises(ConfigError, match=r"storage=\.\.\. says how addresses are read"):
            open_source(source, storage=config)


def test_objects_of_datasets_go_to_their_own_source() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": str(index), "image": b"x"} for index in range(3)]
    table = datasets.Dataset.from_list(rows)
    assert isinstance(open_source(table), HuggingFaceSource)
    assert isinstance(open_source(table.to_iterable_dataset()), HuggingFaceSource)
    with pytest.raises(ConfigError, match=r"pass one of them, such as dataset\['train'\]"):
        open_source(datasets.DatasetDict(train=table))
    assert isinstance(open_source(iter(table)), IterableSource)
