"""Addresses become local paths, in order, or are refused by name before anything is opened."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st
from support.remote import nothing_survives  # noqa: F401

from jest_stream.config.storage import StorageConfig
from jest_stream.errors import (
    ConfigError,
    ShardChangedError,
    ShardUnavailableError,
    UnsafeDataError,
)
from jest_stream.storage.addresses import _count
from jest_stream.storage.hub_driver import parse
from jest_stream.storage.storage import Storage
from jest_stream.types import ObjectInfo

expand = Storage().expand


def test_braces_globs_and_lists_expand_in_the_order_written(tmp_path: Path) -> None:
    for name in ("b0.tar", "b1.tar", "a0.tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/b{{0..1}}.tar") == [f"{tmp_path}/b0.tar", f"{tmp_path}/b1.tar"]
    assert expand(f"{tmp_path}/*0.tar") == [f"{tmp_path}/a0.tar", f"{tmp_path}/b0.tar"]
    assert expand([tmp_path / "b1.tar", f"{tmp_path}/{{b,a}}0.tar"]) == [
        f"{tmp_path}/b1.tar",
        f"{tmp_path}/b0.tar",
        f"{tmp_path}/a0.tar",
    ]


def test_home_folder_and_file_addresses_are_local_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert expand("~/x.tar") == ["/home/someone/x.tar"]
    assert expand("file:///data/a%20b.tar") == ["/data/a b.tar"]
    assert expand("file://localhost/data/a.tar") == ["/data/a.tar"]
    with pytest.raises(ConfigError, match="three slashes"):
        expand("file://data/a.tar")


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    (tmp_path / "x[1].tar").touch()
    assert expand(tmp_path / "x[1].tar") == [f"{tmp_path}/x[1].tar"]


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "PIPE:cat x.tar",
        "{pipe,file}:cat x.tar",
        "simplecache::file:///x.tar",
        "/data/a.tar::/data/b.tar",
        "ftp://host/x.tar",
        "data:x.tar",
        "reference://x",
    ],
)
def test_schemes_outside_the_allow_list_are_refused(url: str) -> None:
    with pytest.raises(UnsafeDataError):
        expand(url)


@pytest.mark.parametrize("scheme", ["s3", "gs", "http", "https"])
def test_remote_addresses_are_expanded_without_asking_anybody(scheme: str) -> None:
    host = f"{scheme}://nowhere.invalid"
    assert expand([f"{scheme.upper()}://nowhere.invalid/{{0..1}}.tar", f"{host}/a b.tar"]) == [
        f"{host}/0.tar",
        f"{host}/1.tar",
        f"{host}/a b.tar",
    ]
    with pytest.raises(ConfigError, match="names no host"):
        expand(f"{scheme}:/a.tar")
    with pytest.raises(UnsafeDataError, match="control character"):
        expand(f"{host}/a\nb.tar")


def test_a_query_is_no_pattern() -> None:
    signed = "https://nowhere.invalid/a.tar?X-Amz-Signature=[*]"
    assert expand(signed) == [signed]
    assert expand("s3://bucket/a.tar?versionId=1") == ["s3://bucket/a.tar?versionId=1"]


def test_what_is_refused_is_shown_without_secrets() -> None:
    for url in ("ftp://me:SECRET@host/a.tar", "ftp://host/a.tar?token=SECRET", "a::s3://SECRET@b"):
        with pytest.raises(UnsafeDataError) as raised:
            expand(url)
        assert "SECRET" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "parts", "again"),
    [
        ("hf://datasets/a/b/x/y.tar", ("dataset", "a/b", "", "x/y.tar"), ""),
        ("hf://datasets/a/b@v1/x.tar", ("dataset", "a/b", "v1", "x.tar"), ""),
        ("hf://a/b@main/x.tar", ("model", "a/b", "main", "x.tar"), ""),
        ("hf://spaces/a/b", ("space", "a/b", "", ""), "hf://spaces/a/b/"),
        (
            "hf://datasets/a/b@refs/convert/parquet/x.parquet",
            ("dataset", "a/b", "refs/convert/parquet", "x.parquet"),
            "hf://datasets/a/b@refs%2Fconvert%2Fparquet/x.parquet",
        ),
        (
            "hf://datasets/a/b@refs%2Fpr%2F7/x.tar",
            ("dataset", "a/b", "refs/pr/7", "x.tar"),
            "",
        ),
    ],
)
def test_addresses_of_the_hub_are_taken_apart(url: str, parts: tuple[str, ...], again: str) -> None:
    assert parse(url) == parts
    assert parse(url).url == (again or url)


@pytest.mark.parametrize("url", ["hf://gpt2", "hf://datasets/a", "hf://buckets/a/b/x.tar"])
def test_other_addresses_of_the_hub_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="hf://datasets/org/name"):
        parse(url)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="pip install s3fs"):
        Storage().info("s3://bucket/a.tar")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"read_ahead_bytes": 1000}, "read_ahead_bytes must be a number of bytes of at least"),
        ({"cache_bytes": 0}, "cache_bytes"),
        ({"stall_timeout_s": 0}, "stall_timeout_s must be a number of seconds above 0"),
        ({"retry_timeout_s": float("inf")}, "retry_timeout_s"),
        ({"cache_folder": ""}, "cache_folder is empty"),
        ({"options": {"ftp": {}}}, "scheme 'ftp'"),
        ({"options": {"s3": ["anon"]}}, "must be a dict"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        StorageConfig(**settings)


def test_options_that_a_driver_does_not_know_are_named() -> None:
    storage = Storage(StorageConfig(options={"s3": {"max_concurrency": "many"}}))
    with pytest.raises(ConfigError, match=r"options\['s3'\] do not fit s3fs"):
        storage.info("s3://bucket/a.tar")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"endpoint_url": "nowhere"}, "Invalid endpoint: nowhere"),
        ({"profile": "no-such-profile"}, "profile .no-such-profile. could not be found"),
        ({"key": "AKIAEXAMPLE"}, "Partial credentials"),
        ({"client_kwargs": {"colour": "red"}}, "unexpected keyword argument 'colour'"),
    ],
)
def test_options_that_fail_when_it_connects_are_named(options: dict[str, Any], said: str) -> None:
    storage = Storage(StorageConfig(options={"s3": options}))
    with pytest.raises(ShardUnavailableError, match=rf"s3://bucket/a\.tar.*{said}.*options="):
        storage.info("s3://bucket/a.tar")


@pytest.mark.parametrize(
    "url",
    ["s3://bucket", "s3://bucket/folder/", "gs://bucket/", "hf://datasets/org/name", "hf://org/n/"],
)
def test_a_folder_of_a_store_is_no_shard(url: str) -> None:
    with pytest.raises(ConfigError, match=rf"{url}' is a bucket.*pass a pattern: .*/\*\.tar'"):
        Storage().expand([url])


def test_what_is_no_path_or_address_is_named() -> None:
    with pytest.raises(ConfigError, match="lists a NoneType"):
        Storage().expand(["a.tar", None])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="is no address: Invalid IPv6 URL"):
        Storage().expand("http://[host/a.tar")


def test_nothing_to_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="matches no file"):
        expand(f"{tmp_path}/*.tar")
    with pytest.raises(ConfigError, match="empty list"):
        expand([])
    with pytest.raises(ConfigError, match="empty path"):
        expand("")
    with pytest.raises(ConfigError, match="unbalanced"):
        expand("{0..3.tar")


@pytest.mark.parametrize(
    "bomb",
    [
        "{0..999999999}.tar",
        "{0..9999}/{0..9999}.tar",
        "{a,{0..999999}{0..999999}}.tar",
        "{1..9}" * 12,
        "{-99999999..99999999..3}",
    ],
)
def test_a_pattern_of_too_many_shards_is_refused_before_it_is_expanded(bomb: str) -> None:
    start = time.perf_counter()
    with pytest.raises(UnsafeDataError, match="limit is 1,000,000"):
        expand(bomb)
    assert time.perf_counter() - start < 1


def test_the_limit_counts_a_whole_list() -> None:
    with pytest.raises(UnsafeDataError, match="limit"):
        expand(["x{0..599999}", "y{0..599999}"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["{", "}", ",", "{1..3}", "{a..e..2}", "x", "-", "{b,}"])))
def test_patterns_are_counted_as_they_are_expanded(parts: list[str]) -> None:
    pattern = "".join(parts)
    try:
        count = _count(pattern)
    except ValueError:
        return  # refused, where braceexpand may be more lenient
    assert count == len(list(braceexpand(pattern)))


def test_a_shard_that_cannot_be_opened_is_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ShardUnavailableError, match="No such file") as raised:
        Storage().open(str(tmp_path / "gone.tar"))
    assert raised.value.shard == str(tmp_path / "gone.tar")
    assert raised.value.attempts == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_shard_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.tar"
    path.touch(mode=0o000)
    with pytest.raises(ShardUnavailableError, match="Permission"):
        Storage().open(str(path))


def test_a_local_shard_of_another_length_than_expected_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(10))
    expected = Storage().info(str(path))
    assert expected == ObjectInfo(10, "")
    with Storage().open(str(path), expected) as file:
        assert file.read() == bytes(10)
    path.write_bytes(bytes(11))
    with pytest.raises(ShardChangedError, match="11 bytes, but 10"):
        Storage().open(str(path), expected)
