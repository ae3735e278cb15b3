"""An error that was handled keeps nothing alive: no frame of the training loop, no reader.

pytest tests/test_errors_let_go.py

An error that passes through a loop refers to the loop's frame by its traceback. Where a frame of
ours that is in the traceback refers to the error, all of it waits for the garbage collector: models
on the GPU, workers, files. Here the collector is off.
"""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fault_server import FaultServer
from support.faults import Fault
from support.hub_server import HubServer, parquet_of
from support.models import TinyTwoTower
from support.models import tiny_dataset as jest
from support.remote import AT_ONCE, nothing_survives, until  # noqa: F401
from support.shards import make_example

from jest_stream import JESTDataset
from jest_stream.config.storage import StorageConfig
from jest_stream.errors import (
    BadExampleError,
    BadExampleLimitError,
    NonFiniteError,
    ResumeMismatchError,
    ShardTruncatedError,
    ShardUnavailableError,
    StalledError,
    UserCodeError,
    WorkerDiedError,
)
from jest_stream.sources.huggingface import HuggingFaceSource

WORKERS = [0, 2]


@pytest.fixture(autouse=True)
def no_collector(nothing_survives: None) -> Iterator[None]:  # noqa: F811
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def train(make: Callable[[], JESTDataset], kind: type[BaseException]) -> weakref.ref[Any]:
    """A loop that meets an error and handles it; returns what tells whether its frame is gone."""
    model = TinyTwoTower(seed=3)
    dataset = make()
    has_failed = False
    try:
        for _ in islice(dataset, 40):
            pass
    except kind as error:
        has_failed = type(error) is kind
    assert has_failed
    return weakref.ref(model)


def assert_lets_go(make: Callable[[], JESTDataset], kind: type[BaseException]) -> None:
    frame = train(make, kind)
    until(lambda: frame() is None, limit_s=2)  # fsspec's thread may still be busy with it


def cut(shards: list[str]) -> None:
    for shard in map(Path, shards):
        shard.write_bytes(shard.read_bytes()[: -shard.stat().st_size // 2048 * 512])


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("num_workers", WORKERS)
def test_of_a_shard_that_was_cut(own_shards: list[str], num_workers: int, lookahead: int) -> None:
    cut(own_shards)
    options = {"num_workers": num_workers, "lookahead": lookahead}
    assert_lets_go(lambda: jest(own_shards, **options), ShardTruncatedError)


def test_that_waits_after_a_batch_when_the_dataset_is_closed(own_shards: list[str]) -> None:
    cut(own_shards)

    def broken_off() -> weakref.ref[Any]:
        model = TinyTwoTower(seed=3)
        with jest(own_shards, lookahead=8) as dataset:
            for _ in dataset:
                break
        return weakref.ref(model)

    assert broken_off()() is None


def not_an_image(image: Any) -> Any:
    raise LookupError("no picture")


def stops(image: Any) -> Any:
    return next(iter(()))


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"transform": not_an_image}, LookupError),
        ({"train_transform": not_an_image}, LookupError),
        ({"transform": stops}, UserCodeError),
        ({"train_transform": stops}, UserCodeError),
        ({"text_key": "gone"}, BadExampleError),
        ({"text_key": "gone", "on_bad_example": "skip"}, BadExampleLimitError),
    ],
)
def test_of_transforms_and_bad_examples(
    own_shards: list[str], options: dict[str, Any], kind: type[Exception], num_workers: int
) -> None:
    assert_lets_go(lambda: jest(own_shards, num_workers=num_workers, **options), kind)


class Broken(TinyTwoTower):
    def encode_text(self, text: Any) -> Any:
        return super().encode_text(text) * torch.nan


def test_of_scoring(own_shards: list[str]) -> None:
    assert_lets_go(lambda: jest(own_shards, reference=Broken(seed=2)), NonFiniteError)


def test_of_a_checkpoint_that_does_not_fit(own_shards: list[str]) -> None:
    with jest(own_shards) as dataset:
        state = dataset.state_dict()

    def resumed() -> JESTDataset:
        dataset = jest(own_shards, seed=5)
        dataset.load_state_dict(state)
        return dataset

    def tried() -> weakref.ref[Any]:
        model = TinyTwoTower(seed=3)
        try:
            resumed()
        except ResumeMismatchError:
            pass
        return weakref.ref(model)

    assert tried()() is None


def killed(image: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def asleep(image: Any) -> Any:
    signal.pause()


@pytest.mark.parametrize(("transform", "kind"), [(killed, WorkerDiedError), (asleep, StalledError)])
def test_of_a_worker(own_shards: list[str], transform: Any, kind: type[Exception]) -> None:
    options = {"num_workers": 2, "timeout_s": 1.0, "transform": transform}
    assert_lets_go(lambda: jest(own_shards, **options), kind)


FAULTS = {
    "forbidden": Fault("status", status=403),
    "busy": Fault("status", status=503),
    "reset": Fault("reset", after_bytes=5000),
    "stall": Fault("stall", after_bytes=5000),
    "truncated": Fault("truncate", after_bytes=5000),
}


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_of_storage(own_shards: list[str], fault: str, num_workers: int) -> None:
    with FaultServer(Path(own_shards[0]).parent) as server:
        urls = [server.url(Path(shard).name) for shard in own_shards]

        def make() -> JESTDataset:
            dataset = jest(urls, storage=AT_ONCE, num_workers=num_workers)
            server.add(FAULTS[fault])
            return dataset

        assert_lets_go(make, ShardUnavailableError)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_of_a_parquet_file_that_was_cut(num_workers: int) -> None:
    whole = parquet_of([make_example(index) for index in range(24)])
    with HubServer() as hub:
        hub.put("acme/cut", {"train-0.parquet": whole, "train-1.parquet": whole[:-9000]})
        storage = StorageConfig(retry_timeout_s=2, options={"hf": {"endpoint": hub.url}})
        source = HuggingFaceSource("acme/cut", storage=storage)
        assert_lets_go(lambda: jest(source, num_workers=num_workers), ShardTruncatedError)
        source.close()
