"""A cache that does not belong, or is not whole, is a named error; nothing wrong is ever scored.

pytest tests/reference_cache/test_bad_caches.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cache_builds import build, cached_dataset, train_from
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor, tokenize
from support.s3_server import S3Server
from support.shards import make_example, members, write_shards, write_tar

from jest_stream import ReferenceCache, SelectionConfig, StorageConfig, TarSource
from jest_stream.errors import (
    BadExampleLimitError,
    CacheDamagedError,
    CachedShardChangedError,
    ConfigError,
    IncompleteCacheError,
    NotCachedError,
    ReferenceMismatchError,
    ShardChangedError,
    ShardError,
    ShardUnavailableError,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

NUM_SHARDS, PER_SHARD = 4, 12

SHARDS = {"num_shards": NUM_SHARDS, "examples_per_shard": PER_SHARD}


def test_a_folder_without_a_cache_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no reference cache in .*jest-stream cache SOURCE"):
        ReferenceCache(tmp_path)
    with pytest.raises(ConfigError, match=r"no folder of a reference cache.*open_clip:ViT-B-32"):
        cached_dataset(write_shards(tmp_path / "s"), str(tmp_path / "typo"))


def test_an_incomplete_build_says_how_much_is_done(folder: Path, own_shards: list[str]) -> None:
    for name in ("manifest.json", "00002.json"):
        (folder / name).unlink()
    for opened in (lambda: ReferenceCache(folder), lambda: cached_dataset(own_shards, str(folder))):
        with pytest.raises(IncompleteCacheError, match="3 of 4 shards are done") as raised:
            opened()
        assert (raised.value.num_done, raised.value.num_shards) == (3, 4)


def test_a_future_version_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 3}))
    with pytest.raises(ReferenceMismatchError, match="version 3, this release reads 2"):
        ReferenceCache(folder)


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_a_cut_manifest_says_where(folder: Path, keep: int) -> None:
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data[:keep])
    with pytest.raises(CacheDamagedError, match="is no whole JSON object") as raised:
        ReferenceCache(folder)
    assert raised.value.offset == len(data[:keep])


@pytest.mark.parametrize("change", [{"num_shards": 5}, {"shards": 3}, {"shards": [{}] * 4}])
def test_a_manifest_that_contradicts_itself_is_damaged(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(CacheDamagedError, match="lists .* shards|does not describe a shard"):
        ReferenceCache(folder)


def test_a_manifest_cannot_point_outside_of_its_folder(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("00001.arrow", "../00001.arrow"))
    with pytest.raises(CacheDamagedError, match="a file outside of the cache"):
        ReferenceCache(folder)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zeroed(data: bytes) -> bytes:
    return data[:8] + bytes(len(data) - 8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (half, r"00002.arrow' .* has [\d,]+ bytes, the manifest says [\d,]+"),
        (lambda data: b"", r"00002.arrow' .* has 0 bytes"),
        (lambda data: data + b"x", r"00002.arrow' .* has [\d,]+ bytes"),
        (zeroed, r"00002.arrow' .* is no whole Arrow file"),
        (lambda data: bytes(len(data)), "is no whole Arrow file"),
    ],
    ids=["cut", "empty", "longer", "zeros after the head", "zeros"],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_file_is_named(
    folder: Path,
    own_shards: list[str],
    damage: Callable[[bytes], bytes],
    message: str,
    num_workers: int,
) -> None:
    path = folder / "00002.arrow"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CacheDamagedError, match=message) as raised:
        train_from(own_shards, str(folder), num_workers=num_workers)
    assert raised.value.shard == str(path)
    assert isinstance(raised.value, ShardError)


def test_a_missing_file_is_named(folder: Path, own_shards: list[str]) -> None:
    (folder / "00001.arrow").unlink()
    with pytest.raises(ShardUnavailableError, match="00001.arrow"):
        train_from(own_shards, str(folder))


def test_another_file_under_the_name_is_noticed(folder: Path, own_shards: list[str]) -> None:
    data = (folder / "00000.arrow").read_bytes()
    assert len(data) == (folder / "00003.arrow").stat().st_size
    (folder / "00003.arrow").write_bytes(data)  # whole, of the same size, with other keys
    with pytest.raises(NotCachedError, match=r"example '0000\d\d' of shard .*00003.tar'"):
        train_from(own_shards, str(folder))


def test_a_file_of_another_reference_is_noticed(
    folder: Path, own_shards: list[str], tmp_path: Path
) -> None:
    views = {"transform": to_tensor, "tokenizer": tokenize}
    ReferenceCache.build(own_shards, TinyTwoTower(3), tmp_path / "other", **views)
    shutil.copy(tmp_path / "other" / "00001.arrow", folder)  # as long, and with the same keys
    with pytest.raises(CacheDamagedError, match="00001.arrow' .* is a file of another cache"):
        train_from(own_shards, str(folder))


def test_a_build_whose_folder_was_claimed_by_another_is_not_completed(
    tmp_path: Path, own_shards: list[str]
) -> None:
    other, claimed = tmp_path / "other", tmp_path / "cache"
    views = {"transform": to_tensor, "tokenizer": tokenize}
    ReferenceCache.build(own_shards, TinyTwoTower(3), other, **views)

    def transform(image: Any) -> torch.Tensor:
        if claimed.exists():  # both had found the folder empty; the other's file is the last
            shutil.copy(other / "build.json", claimed)
        return to_tensor(image)

    with pytest.raises(ReferenceMismatchError, match="of something else: weights was"):
        build(own_shards, claimed, transform=transform)
    with pytest.raises(IncompleteCacheError):
        ReferenceCache(claimed)


def test_every_byte_of_a_file_may_be_wrong_without_a_crash(
    folder: Path, own_shards: list[str]
) -> None:
    source, path = TarSource(own_shards), folder / "00000.arrow"
    data, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    with ReferenceCache(folder) as cache:
        joined = cache.join(source)
        for _ in range(150):
            at = int(torch.randint(len(data), (), generator=generator))
            path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
            try:
                found = list(joined.read(0))
            except ReferenceMismatchError:
                continue
            assert len(found) == PER_SHARD


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_missing_key_raises_or_is_left_out_and_counted(
    tmp_path: Path, folder: Path, own_shards: list[str], num_workers: int
) -> None:
    renamed = [make_example(index) for index in range(PER_SHARD)]
    renamed[5]["__key__"] = "00000x"  # as long as before: the shard has the same size
    write_tar(Path(own_shards[0]), members(renamed))
    with pytest.raises(
        NotCachedError, match=r"'00000x' of shard '.*00000.tar' .*12 of the 12"
    ) as e:
        train_from(own_shards, str(folder), num_workers=num_workers)
    assert (e.value.key, e.value.reason) == ("00000x", "not_cached")
    metrics = train_from(
        own_shards,
        str(folder),
        num_workers=num_workers,
        on_bad_example="skip",
        filter_ratio=0.5,
        num_steps=12,
    ).metrics()
    assert metrics["skipped/not_cached"] >= 1


def test_a_cache_of_other_data_is_refused(
    tmp_path: Path, folder: Path, own_shards: list[str]
) -> None:
    others = write_shards(tmp_path / "others", num_shards=6)
    with pytest.raises(
        ReferenceMismatchError, match=r"2 of its 6 shards are not in it.*'00004.tar'"
    ):
        cached_dataset(others, str(folder))
    with pytest.raises(ReferenceMismatchError, match="1 of its 1 shards are not in it"):
        cached_dataset([make_example(0)] * 9, str(folder))


def test_a_changed_shard_is_noticed_by_its_length(
    tmp_path: Path, folder: Path, own_shards: list[str]
) -> None:
    write_shards(tmp_path, num_shards=1, examples_per_shard=PER_SHARD + 40)
    message = r"00000.tar' has changed .* it had [\d,]+ bytes, and has [\d,]+"
    with pytest.raises(CachedShardChangedError, match=message) as raised:
        train_from(own_shards, str(folder))
    assert isinstance(raised.value, ShardChangedError)


def test_a_changed_shard_is_noticed_by_its_number_of_examples(
    folder: Path, own_shards: list[str]
) -> None:
    fewer = [make_example(index) for index in range(PER_SHARD - 1)]
    size = Path(own_shards[0]).stat().st_size
    for num_bytes in range(0, size, 512):  # a member of no example fills the rest
        write_tar(Path(own_shards[0]), [*members(fewer), (".filler", bytes(num_bytes))])
        if Path(own_shards[0]).stat().st_size == size:
            break
    with pytest.raises(CachedShardChangedError, match="it held 12 examples, and holds 11"):
        train_from(own_shards, str(folder))


def test_a_subset_of_the_shards_in_any_order_is_fine(folder: Path, own_shards: list[str]) -> None:
    assert train_from([own_shards[2], own_shards[0]], str(folder)).metrics()["steps"] == 6


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        (TinyTwoTower(3), "another reference: its weights have the fingerprint"),
        (TinyTwoTower(2, width=8), "another reference"),
        ({"reference": TinyTwoTower(3)}, "another reference"),
        ({"transform": lambda image: to_tensor(image)[:, :4]}, r"the shape was \[3, 8, 8\], is"),
        ({"transform": lambda image: 1 - to_tensor(image)}, "a value of image was .*, is"),
        ({"transform": None}, "the cache was built with a function, here is none"),
        ({"tokenizer": lambda text: tokenize(text.lower())}, "for the text 'Zwei.*a value of"),
        ({"tokenizer": lambda text: tokenize(text).int()}, "the dtype was int64, is int32"),
    ],
)
def test_another_model_or_view_than_expected_says_what_differs(
    folder: Path, expect: Any, message: str
) -> None:
    with pytest.raises(ReferenceMismatchError, match=message):
        ReferenceCache(folder, expect=expect)


def test_what_was_expected_is_accepted(folder: Path) -> None:
    ReferenceCache(folder, expect=TinyTwoTower(2))
    views = {"transform": to_tensor, "tokenizer": tokenize}
    cache = ReferenceCache(folder, expect={"reference": TinyTwoTower(2), **views})
    ReferenceCache(folder, expect=cache.fingerprints)
    with pytest.raises(ConfigError, match=r"expect names \['model'\]"):
        ReferenceCache(folder, expect={"model": TinyTwoTower(2)})


def test_views_given_with_a_cache_must_be_those_of_the_cache(
    folder: Path, own_shards: list[str]
) -> None:
    cached_dataset(
        own_shards, str(folder), reference_transform=to_tensor, reference_tokenizer=tokenize
    ).close()
    with pytest.raises(ReferenceMismatchError, match="another transform"):
        cached_dataset(
            own_shards, str(folder), reference_transform=lambda image: to_tensor(image) / 2
        )
    with pytest.raises(ReferenceMismatchError, match="text_key='txt;text', this dataset has"):
        cached_dataset(own_shards, str(folder), text_key="caption")


def test_half_a_copied_cache_is_incomplete_or_names_what_is_missing(
    tmp_path: Path, folder: Path, own_shards: list[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("build.json", "00000.arrow", "00000.json"):
        shutil.copy(folder / name, copy / name)
    with pytest.raises(IncompleteCacheError, match="1 of 4"):
        cached_dataset(own_shards, str(copy))


def test_a_wholly_wrong_cache_is_not_skipped_in_silence(
    tmp_path: Path, own_shards: list[str]
) -> None:
    for index, shard in enumerate(own_shards):
        examples = [make_example(i, prefix="x") for i in range(100 * index, 100 * index + 130)]
        write_tar(Path(shard), members(examples))
    build(own_shards, tmp_path / "wrong")
    for index, shard in enumerate(own_shards):
        examples = [make_example(i, prefix="y") for i in range(100 * index, 100 * index + 130)]
        write_tar(Path(shard), members(examples))
    with pytest.raises(BadExampleLimitError, match="100 bad examples in a row"):
        train_from(own_shards, str(tmp_path / "wrong"), on_bad_example="skip")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_cache_that_becomes_unreachable_is_named_with_its_attempts(
    s3: S3Server, own_shards: list[str], num_workers: int
) -> None:
    storage = StorageConfig(
        options=s3.options, retry_timeout_s=1.5, connect_timeout_s=2, stall_timeout_s=2
    )
    cache_path = f"s3://{s3.make_bucket()}/cache"
    build(own_shards, cache_path, storage=s3.config).close()
    with cached_dataset(
        own_shards,
        cache := ReferenceCache(cache_path, storage=storage),
        selection=SelectionConfig(score="easy_reference"),
        num_workers=num_workers,
        lanes=1,
        super_batch_size=8,
        lookahead=0,
    ) as dataset:
        iterator = iter(dataset)
        next(iterator)
        s3.kill()
        try:
            with pytest.raises(
                ShardUnavailableError, match=r"cannot read shard 's3://.*"
            ) as raised:
                for _ in range(20):
                    next(iterator)
        finally:
            s3.start()
    cache.close()
    assert raised.value.attempts > 1
