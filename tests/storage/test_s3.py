"""Shards in a real object store are read as local ones are, through a crash of the server too.

pytest tests/storage/test_s3.py
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Image
from support.leaks import nothing_left_behind
from support.remote import nothing_survives  # noqa: F401
from support.s3_server import KEY, SECRET, S3Server
from support.shards import write_shards, write_tar
from torchvision.transforms.v2.functional import pil_to_tensor

from jest_stream import JESTDataset, SelectionConfig
from jest_stream.config.storage import StorageConfig
from jest_stream.errors import (
    ConfigError,
    ShardChangedError,
    ShardError,
    ShardUnavailableError,
    UnsafeDataError,
)
from jest_stream.sources.tar import TarSource
from jest_stream.types import Example

NUM_SHARDS, PER_SHARD = 4, 8
SECRETS = (KEY, SECRET, "another-secret")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four shards of eight examples."""
    folder = tmp_path_factory.mktemp("local")
    return write_shards(folder, num_shards=NUM_SHARDS, examples_per_shard=PER_SHARD)


@pytest.fixture(scope="module")
def bucket(s3: S3Server, local: list[str]) -> str:
    """The same shards in a bucket; returns its address."""
    return s3.put_files(local)


@pytest.fixture
def sources(s3: S3Server) -> Iterator[Callable[..., TarSource]]:
    """Makes sources of the server's shards, and closes them at the end."""
    made: list[TarSource] = []

    def make(urls: Any, **settings: Any) -> TarSource:
        made.append(TarSource(urls, storage=dataclasses.replace(s3.config, **settings)))
        return made[-1]

    yield make
    for source in made:
        source.close()


def read(source: TarSource, shard: int, **start: int) -> list[tuple[Example, int]]:
    """Returns examples and offsets of a shard, without the shard's name."""
    found = []
    for example, after in source.read(shard, **start):
        assert isinstance(example, dict)
        found.append(({k: v for k, v in example.items() if k != "__shard__"}, after))
    return found


def read_all(source: TarSource) -> list[tuple[Example, int]]:
    return [row for shard in range(source.num_shards) for row in read(source, shard)]


def large_shard(folder: Path, name: str = "large.tar", seed: int = 0) -> str:
    """Writes a shard of 10 MB whose bytes do not repeat."""
    draw = random.Random(seed)
    files = [(f"{i:03d}.jpg", draw.randbytes(250_000)) for i in range(40)]
    return write_tar(folder / name, files)


@pytest.mark.parametrize("pattern", ["{00000..00003}.tar", "*.tar", "0000[0-3].tar", "list"])
def test_every_way_to_name_shards_gives_what_is_on_disk(
    s3: S3Server,
    bucket: str,
    local: list[str],
    sources: Callable[..., TarSource],
    pattern: str,
) -> None:
    urls: Any = f"{bucket}/{pattern}"
    if pattern == "list":
        urls = [f"{bucket}/{Path(path).name}" for path in local]
    source = sources(urls)
    assert source.shard_name(1) == f"{bucket}/00001.tar"
    assert read_all(source) == read_all(TarSource(local))
    assert source.take_counts()["storage_bytes"] >= sum(Path(p).stat().st_size for p in local)


def test_a_manifest_beside_the_shards_says_how_much_there_is(
    s3: S3Server, local: list[str], sources: Callable[..., TarSource]
) -> None:
    bucket = s3.put_files(local).removeprefix("s3://")
    sizes = {Path(path).name: PER_SHARD for path in local}
    source = sources(s3.put(bucket, "sizes.json", json.dumps(sizes).encode()))
    assert source.num_examples == [PER_SHARD] * NUM_SHARDS
    assert read_all(source) == read_all(TarSource(local))
    shards = [{"url": "../00000.tar", "nsamples": PER_SHARD + 1, "filesize": 10}]
    shards.append({"url": "../00001.tar", "nsamples": PER_SHARD + 1})
    index = json.dumps({"wids_version": 1, "shardlist": shards}).encode()
    wrong = sources(s3.put(bucket, "meta/index.json", index))
    with pytest.raises(ShardError, match=r"00000.tar' has [\d,]+ bytes, its manifest promises 10:"):
        read(wrong, 0)
    with pytest.raises(ShardError, match="holds 8 examples, its manifest promises 9"):
        read(wrong, 1)


@pytest.mark.parametrize("url", ["/etc/passwd", "~/x.tar", "../../x.tar", "file:///etc/passwd"])
def test_a_remote_manifest_names_no_file_of_this_machine(
    s3: S3Server, sources: Callable[..., TarSource], url: str
) -> None:
    manifest = s3.put(s3.make_bucket(), "m/sizes.json", json.dumps({url: 1}).encode())
    with pytest.raises(UnsafeDataError, match="manifest"):
        sources(manifest)


def test_a_listing_names_the_source_as_local_sizes_do(
    s3: S3Server, bucket: str, local: list[str], sources: Callable[..., TarSource]
) -> None:
    assert sources(f"{bucket}/*.tar").fingerprint == TarSource(local).fingerprint
    by_braces = sources(f"{bucket}/{{00000..00003}}.tar").fingerprint
    assert by_braces == sources([f"{bucket}/{Path(path).name}" for path in local]).fingerprint
    assert by_braces != sources(f"{bucket}/{{00000..00002}}.tar").fingerprint


def test_only_the_first_of_many_shards_is_asked_for_at_the_start(
    bucket: str, sources: Callable[..., TarSource]
) -> None:
    many = sources(f"{bucket}/{{00000..09999}}.tar")
    assert many.take_counts()["storage_requests"] == 1
    with pytest.raises(ShardUnavailableError, match=r"00004\.tar"):
        read(many, 4)


def test_resuming_reads_on_at_the_byte(
    s3: S3Server, tmp_path: Path, sources: Callable[..., TarSource]
) -> None:
    path = large_shard(tmp_path)
    url = s3.put_files([path]) + "/large.tar"
    source = sources(url, read_ahead_bytes=1 << 20)
    whole = read(source, 0)
    assert whole == read(TarSource(path), 0)
    source.take_counts()
    resumed = pickle.loads(pickle.dumps(source))  # as a worker gets it
    assert read(resumed, 0, offset=whole[-3][1], index=38) == whole[-2:]
    counts = resumed.take_counts()
    resumed.close()
    assert counts["storage_bytes"] < 2 * 250_000 + (1 << 20)


def test_reading_goes_on_after_the_server_was_killed_and_restarted(
    s3: S3Server, tmp_path: Path, sources: Callable[..., TarSource]
) -> None:
    path = large_shard(tmp_path)
    source = sources(s3.put_files([path]) + "/large.tar", read_ahead_bytes=1 << 20)
    reader = source.read(0)
    given = [next(reader) for _ in range(5)]
    s3.kill()
    restart = threading.Thread(target=s3.start)
    restart.start()
    try:
        given += reader
    finally:
        restart.join()
    expected = list(TarSource(path).read(0))
    assert [after for _, after in given] == [after for _, after in expected]
    for (ours, _), (theirs, _) in zip(given, expected, strict=True):
        assert isinstance(ours, dict) and isinstance(theirs, dict)
        assert (ours["__key__"], ours["jpg"]) == (theirs["__key__"], theirs["jpg"])
    assert source.take_counts()["storage_retries"] > 0


def test_a_server_that_stays_away_is_an_error_in_time(
    s3: S3Server, tmp_path: Path, sources: Callable[..., TarSource]
) -> None:
    url = s3.put_files([large_shard(tmp_path)]) + "/large.tar"
    source = sources(url, read_ahead_bytes=1 << 20, retry_timeout_s=1.0)
    reader = source.read(0)
    next(reader)
    s3.kill()
    try:
        with pytest.raises(ShardUnavailableError, match=r"large\.tar") as raised:
            list(reader)
        assert raised.value.attempts > 1
    finally:
        s3.start()


def test_an_object_overwritten_while_it_is_read_is_an_error(
    s3: S3Server, tmp_path: Path, sources: Callable[..., TarSource]
) -> None:
    bucket = s3.put_files([large_shard(tmp_path)]).removeprefix("s3://")
    source = sources(f"s3://{bucket}/large.tar", read_ahead_bytes=1 << 20)
    reader = source.read(0)
    next(reader)
    # Of the same length and form: only the ETag tells.
    s3.put(bucket, "large.tar", Path(large_shard(tmp_path, "other.tar", seed=1)).read_bytes())
    with pytest.raises(ShardChangedError, match=r"large\.tar"):
        list(reader)
    with pytest.raises(ShardChangedError):  # and stays one: the version seen first counts
        list(source.read(0))
    assert len(read(sources(f"s3://{bucket}/large.tar"), 0)) == 40


def test_wrong_credentials_are_named_without_showing_them(s3: S3Server, bucket: str) -> None:
    for options in (
        {"key": KEY, "secret": "another-secret"},
        {"key": "nobody", "secret": SECRET},
        {"anon": True},
    ):
        config = StorageConfig(options={"s3": {"endpoint_url": s3.endpoint, **options}})
        for urls in (f"{bucket}/00000.tar", f"{bucket}/*.tar"):
            with pytest.raises(ShardUnavailableError, match="403|denied|Forbidden") as raised:
                TarSource(urls, storage=config)
            shown = "".join(traceback.format_exception(raised.value)) + repr(config)
            assert not any(secret in shown for secret in SECRETS)
            assert raised.value.attempts == 1


def test_missing_buckets_and_keys_are_named_at_once(
    bucket: str, sources: Callable[..., TarSource]
) -> None:
    for url in ("s3://no-such-bucket/x.tar", f"{bucket}/gone.tar"):
        with pytest.raises(ShardUnavailableError, match=url) as raised:
            sources(url)
        assert raised.value.attempts == 1
    with pytest.raises(ConfigError, match=r"gone-.*matches nothing"):
        sources(f"{bucket}/gone-*.tar")


def test_shards_are_read_from_disk_once_they_were_downloaded(
    bucket: str, local: list[str], tmp_path: Path, sources: Callable[..., TarSource]
) -> None:
    num_bytes = sum(Path(path).stat().st_size for path in local)
    first, second = (
        sources(f"{bucket}/*.tar", cache_folder=str(tmp_path / "cache")) for _ in range(2)
    )
    assert read_all(first) == read_all(first) == read_all(TarSource(local))
    counts = first.take_counts()
    assert counts["storage_bytes"] == num_bytes
    assert (counts["cache_misses"], counts["cache_hits"]) == (NUM_SHARDS, NUM_SHARDS)
    assert read_all(second) == read_all(first)
    counts = second.take_counts()
    assert "storage_bytes" not in counts and counts["cache_hits"] == NUM_SHARDS


def test_a_changed_object_is_another_entry_of_the_cache(
    s3: S3Server, tmp_path: Path, sources: Callable[..., TarSource]
) -> None:
    bucket, cache = s3.make_bucket(), str(tmp_path / "cache")
    keys = []
    for key in ("a", "b"):
        data = Path(write_tar(tmp_path / "x.tar", [(f"{key}.txt", b"same length")])).read_bytes()
        source = sources(s3.put(bucket, "x.tar", data), cache_folder=cache)
        keys += [example["__key__"] for example, _ in read(source, 0)]
    assert keys == ["a", "b"]


def test_a_cache_below_one_shard_is_an_error_as_soon_as_that_is_known(
    bucket: str, local: list[str], tmp_path: Path, sources: Callable[..., TarSource]
) -> None:
    settings = {"cache_folder": str(tmp_path / "cache"), "cache_bytes": 1000}
    for pattern in ("*.tar", "{00000..00003}.tar"):
        with pytest.raises(ConfigError, match="cache_bytes=1,000 is less than one shard"):
            sources(f"{bucket}/{pattern}", **settings)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cache_folder=.*cannot be used"):
        sources(f"{bucket}/*.tar", cache_folder=str(tmp_path / "file"))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_every_kind_read_what_the_training_process_reads(
    bucket: str, local: list[str], sources: Callable[..., TarSource], method: str
) -> None:
    def keys(source: TarSource, num_workers: int) -> list[list[str]]:
        with JESTDataset(
            source,
            selection=SelectionConfig(method="uniform"),
            transform=picture,
            tokenizer=tokens,
            batch_size=4,
            repeat=False,
            num_workers=num_workers,
            as_dict=True,
        ) as dataset:
            return [batch["key"] for batch in dataset]

    expected = keys(TarSource(local), 0)
    assert sum(map(len, expected)) == NUM_SHARDS * PER_SHARD
    source = sources(f"{bucket}/*.tar")
    read_all(source)  # connected here, too, before there are workers
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(method, force=True)
    try:
        assert keys(source, 2 if method == "fork" else 1) == expected
    finally:
        torch.multiprocessing.set_start_method(before, force=True)
    assert read_all(source) == read_all(TarSource(local))


def test_closing_ends_every_connection_and_reading_makes_new_ones(
    bucket: str, sources: Callable[..., TarSource]
) -> None:
    sources(f"{bucket}/00000.tar").close()  # threads of the first use stay
    with nothing_left_behind():
        source = sources(f"{bucket}/{{00000..00001}}.tar")
        for _ in range(2):
            reader = source.read(1)
            next(reader)
            source.close()
            assert len(read(source, 0)) == PER_SHARD
            source.close()


def picture(image: Image) -> torch.Tensor:
    return pil_to_tensor(image)


def tokens(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode().ljust(24))[:24])
