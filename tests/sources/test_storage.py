"""Addresses become local paths, in order, or are refused by name before anything is opened."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st

from jest_stream.errors import ConfigError, ShardUnavailableError, UnsafeDataError
from jest_stream.storage import _count, expand, open_local


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


@pytest.mark.parametrize("scheme", ["s3", "gs", "http", "https", "hf"])
def test_remote_schemes_say_what_is_supported_and_hide_the_rest_of_the_address(scheme: str) -> None:
    with pytest.raises(ConfigError, match="local disk") as raised:
        expand(f"{scheme}://user:secret@bucket/{{0..3}}.tar?token=secret")
    assert "secret" not in str(raised.value)


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
        open_local(str(tmp_path / "gone.tar"))
    assert raised.value.shard == str(tmp_path / "gone.tar")
    assert raised.value.attempts == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_shard_without_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.tar"
    path.touch(mode=0o000)
    with pytest.raises(ShardUnavailableError, match="Permission"):
        open_local(str(path))
