"""A manifest states the contents; a shard that holds others is an error with both numbers.

pytest tests/sources/test_manifest.py
"""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from support.leaks import no_leaks  # noqa: F401
from support.shards import write_shards, write_tar

from jest_stream.errors import ConfigError, ShardError, ShardUnavailableError, UnsafeDataError
from jest_stream.sources.index import write_manifest
from jest_stream.sources.tar import TarSource
from jest_stream.types import Example

pytestmark = pytest.mark.usefixtures("no_leaks")

NUM_EXAMPLES = 5

SHARDS = {"num_shards": 2, "examples_per_shard": NUM_EXAMPLES}


def manifest(tmp_path: Path, content: Any, name: str = "sizes.json") -> str:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def examples_of(source: TarSource) -> list[Example]:
    found = []
    for shard in range(source.num_shards):
        for example, _ in source.read(shard):
            assert isinstance(example, dict)
            found.append(example)
    return found


def forms(num_bytes: int) -> dict[str, Any]:
    """The same two shards in every form that is read."""
    names = ["00000.tar", "00001.tar"]
    return {
        "webdataset's sizes": dict.fromkeys(names, 5),
        "a wids index": {
            "wids_version": 1,
            "name": "pairs",
            "shardlist": [
                {"url": name, "nsamples": 5, "filesize": num_bytes, "md5sum": "?"} for name in names
            ],
        },
        "ours": {
            "shards": [{"url": name, "num_examples": 5, "num_bytes": num_bytes} for name in names]
        },
    }


@pytest.mark.parametrize("name", forms(0))
def test_every_form_names_the_shards_and_what_they_hold(
    tmp_path: Path, own_shards: list[str], name: str
) -> None:
    path = manifest(tmp_path, forms(Path(own_shards[0]).stat().st_size)[name])
    source = TarSource(path)
    assert source.num_examples == [NUM_EXAMPLES, NUM_EXAMPLES]
    assert [source.shard_name(shard) for shard in (0, 1)] == own_shards
    assert examples_of(source) == examples_of(TarSource(own_shards))
    assert source.fingerprint == TarSource(own_shards).fingerprint
    resumed = [after for _, after in source.read(0)][1]
    assert len(list(source.read(0, offset=resumed, index=2))) == NUM_EXAMPLES - 2


def test_counts_may_be_left_out_and_shards_mixed_with_manifests(
    tmp_path: Path, own_shards: list[str]
) -> None:
    path = manifest(tmp_path, {"shards": [{"url": "00000.tar"}]})
    assert TarSource(path).num_examples is None
    assert TarSource(own_shards).num_examples is None
    counted = manifest(tmp_path, {"00000.tar": 5}, "counted.JSON")
    both = TarSource([counted, own_shards[1]])
    assert both.num_shards == 2 and both.num_examples is None


def test_a_wids_base_moves_the_shards(tmp_path: Path, own_shards: list[str]) -> None:
    (tmp_path / "meta").mkdir()
    entries = [{"url": "00001.tar", "nsamples": 5}]
    path = manifest(tmp_path / "meta", {"base": "..", "shardlist": entries}, "index.json")
    source = TarSource(path)
    assert Path(source.shard_name(0)).resolve() == Path(own_shards[1]).resolve()
    assert len(examples_of(source)) == 5


@pytest.mark.parametrize(("promised", "found"), [(6, "holds 5 examples"), (4, "more than 4")])
def test_another_number_of_examples_is_an_error_that_says_both(
    tmp_path: Path, own_shards: list[str], promised: int, found: str
) -> None:
    source = TarSource(manifest(tmp_path, {"00000.tar": promised}))
    for start in (0, 3):  # at the beginning, and resumed
        offset = [0, *(after for _, after in TarSource(own_shards).read(0))][start]
        given = []
        with pytest.raises(ShardError, match=rf"00000.*{found}.*promises {promised}") as raised:
            for example, _ in source.read(0, offset=offset, index=start):
                given.append(example)
        assert start + len(given) == min(promised, NUM_EXAMPLES)
        assert raised.value.shard == own_shards[0]
    with pytest.raises(ShardError, match=rf"holds 5 examples.*promises {promised}"):
        source.count(0)


def test_another_length_is_an_error_that_says_both(tmp_path: Path, own_shards: list[str]) -> None:
    num_bytes = Path(own_shards[0]).stat().st_size
    entry = {"url": "00000.tar", "num_bytes": num_bytes + 512}
    source = TarSource(manifest(tmp_path, {"shards": [entry]}))
    with pytest.raises(ShardError, match=f"{num_bytes:,} bytes.*promises {num_bytes + 512:,}"):
        next(iter(source.read(0)))


def test_what_is_written_is_read_again_from_wherever_it_is_moved(
    tmp_path: Path, own_shards: list[str]
) -> None:
    write_manifest(TarSource(own_shards), tmp_path / "sizes.json")
    content = json.loads((tmp_path / "sizes.json").read_text())
    num_bytes = Path(own_shards[0]).stat().st_size
    assert content["shards"][0] == {"url": "00000.tar", "num_examples": 5, "num_bytes": num_bytes}
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert TarSource(moved / "sizes.json").num_examples == [5, 5]
    assert len(examples_of(TarSource(moved / "sizes.json"))) == 10
    assert sorted(path.name for path in moved.iterdir()) == ["00000.tar", "00001.tar", "sizes.json"]
    (moved / "elsewhere").mkdir()
    write_manifest(TarSource(f"{moved}/*.tar"), moved / "elsewhere" / "sizes.json")
    assert TarSource(moved / "elsewhere" / "sizes.json").num_examples == [5, 5]


def test_counting_counts_what_reading_gives(tmp_path: Path) -> None:
    files = [("a.jpg", b"1"), ("README", b""), ("a.txt", b"1"), ("b.txt", b""), ("a.jpg", b"again")]
    files += [("__MACOSX/._b.txt", b""), ("d/c.jpg", b"x" * 2000), ("d/.hidden", b"")]
    source = TarSource(write_tar(tmp_path / "x.tar", files))
    assert source.count(0).num_examples == len(list(source.read(0))) == 4


def test_a_broken_shard_is_not_counted(tmp_path: Path, own_shards: list[str]) -> None:
    Path(own_shards[1]).write_bytes(Path(own_shards[1]).read_bytes()[:2048])
    with pytest.raises(ShardError, match=r"00001\.tar"):
        write_manifest(TarSource(own_shards), tmp_path / "sizes.json")
    assert not list(tmp_path.glob("*.json*"))


@pytest.mark.parametrize(
    "path", ["sizes.txt", "s3://bucket/sizes.json", "https://host/sizes.json", "file:///sizes.json"]
)
def test_a_manifest_is_written_to_a_local_json_file(own_shards: list[str], path: str) -> None:
    with pytest.raises(ConfigError, match="local .json file"):
        write_manifest(TarSource(own_shards), path)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "pipe:cat /etc/passwd",
        "simplecache::s3://bucket/x.tar",
        "s3://bucket/a.tar::s3://bucket/b.tar",
        "reference://x",
        "ftp://host/x.tar",
        "memory://x.tar",
    ],
)
@pytest.mark.parametrize("base", [None, "base"])
def test_addresses_that_a_manifest_may_not_name_are_refused(
    tmp_path: Path, url: str, base: str | None
) -> None:
    content = {"shardlist": [{"url": url}]} if base is None else {"base": url, "shardlist": [{}]}
    if base:
        content["shardlist"] = [{"url": "x.tar"}]
    with pytest.raises(UnsafeDataError, match="manifest"):
        TarSource(manifest(tmp_path, content))


@pytest.mark.parametrize("url", ["{0..9}.tar", "*.tar", "a\\b.tar", "x\0.tar"])
def test_an_entry_is_no_pattern(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="one shard, not a pattern"):
        TarSource(manifest(tmp_path, {url: 3}))


NOT_MANIFESTS = {
    "no JSON": ("{", "not JSON"),
    "nothing": ("", "not JSON"),
    "bytes": ("\udcff", "not JSON"),
    "a list": (["00000.tar"], "holds a list"),
    "no shards": ({}, "names no shards"),
    "an empty list of shards": ({"shards": []}, "names no shards"),
    "nested without end": ("[" * 100_000, "nests too deeply"),
    "a count that is text": ({"00000.tar": "5"}, "'5' as '00000.tar', which is no count"),
    "a negative count": ({"00000.tar": -1}, "no count"),
    "a count that is a fraction": ({"00000.tar": 1.5}, "no count"),
    "a count of 5,000 digits": (f'{{"00000.tar": {"9" * 5000}}}', "not JSON: Exceeds the limit"),
    "a name that no file can have": ({"\ud800.tar": 5}, "where a url should be"),
    "a count that is true": ({"00000.tar": True}, "no count"),
    "no count": ({"00000.tar": None}, "gives no count of"),
    "a shard twice": ('{"00000.tar": 5, "00000.tar": 6}', "'00000.tar' twice"),
    "a shard without a name": ({"shards": [{"num_examples": 5}]}, "where a url should be"),
    "an empty name": ({"": 5}, "where a url should be"),
    "a shard that is text": ({"shards": ["00000.tar"]}, "as a shard"),
    "other settings": ({"name": "pairs", "wids_version": 1}, "joins several datasets"),
}


@pytest.mark.parametrize("what", NOT_MANIFESTS)
def test_what_is_no_manifest_is_refused(tmp_path: Path, what: str) -> None:
    content, reason = NOT_MANIFESTS[what]
    if isinstance(content, str):
        (tmp_path / "m.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    else:
        manifest(tmp_path, content, "m.json")
    with pytest.raises(ConfigError, match=reason):
        TarSource(tmp_path / "m.json")


def test_a_manifest_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with open(path, "wb") as file:
        file.truncate(4 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(UnsafeDataError, match="larger than 67,108,864 bytes"):
            TarSource(path)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


def test_missing_manifests_and_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardUnavailableError, match=r"gone\.json"):
        TarSource(tmp_path / "gone.json")
    with pytest.raises(ShardUnavailableError, match=r"gone\.tar"):
        TarSource(manifest(tmp_path, {"gone.tar": 5}))


def test_a_folder_with_braces_in_its_name_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "{a,b}"
    write_shards(folder, num_shards=1, examples_per_shard=2)
    manifest(folder, {"00000.tar": 2})
    assert TarSource(f"{tmp_path}/\\{{a,b\\}}/sizes.json").num_examples == [2]
