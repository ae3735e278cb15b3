"""`TarSource` reads what webdataset reads, knows where each example starts, and seeks there."""

from __future__ import annotations

import io
import os
import random
import string
import tarfile
from pathlib import Path

import psutil
import pytest
import webdataset
from support.leaks import no_leaks  # noqa: F401
from support.shards import make_example, members, write_shards, write_tar
from webdataset.tariterators import group_by_keys, tar_file_expander

from jest_stream.errors import (
    BadExampleError,
    ConfigError,
    ShardChangedError,
    ShardUnavailableError,
    UnsafeDataError,
)
from jest_stream.sources.tar import TarSource

pytestmark = pytest.mark.usefixtures("no_leaks")

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read_all(path: str, **settings: int) -> list[dict]:
    """Returns all examples of one shard; fails on a bad one."""
    examples = []
    for example, _ in TarSource(path, **settings).read(0):
        assert not isinstance(example, BadExampleError), example
        examples.append(example)
    return examples


def reasons(path: str) -> list[str]:
    """Returns per example its key, or why it is bad."""
    return [
        example.reason if isinstance(example, BadExampleError) else example["__key__"]
        for example, _ in TarSource(path).read(0)
    ]


def by_webdataset(path: str) -> list[dict]:
    with open(path, "rb") as stream:  # it does not close files that it opens itself
        samples = group_by_keys(tar_file_expander([{"url": path, "stream": stream}]))
        return [{k: v for k, v in sample.items() if k != "__url__"} for sample in samples]


def without_shard(examples: list[dict]) -> list[dict]:
    return [{k: v for k, v in example.items() if k != "__shard__"} for example in examples]


def test_what_steers_webdataset_by_the_environment_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`GOPEN_REWRITE` and `WDS_*` redirect, log or loosen what webdataset reads."""
    [path] = write_shards(tmp_path, num_shards=1)
    expected = read_all(path)
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}={tmp_path}/elsewhere")
    for name in ("WDS_SECURE", "WDS_REWRITE", "WDS_CACHE", "WDS_SHUFFLE", "WDS_DEBUG"):
        monkeypatch.setenv(name, "1")
    assert read_all(path) == expected


def test_members_of_one_key_become_one_example(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        [("a/b.jpg", b"1"), ("a/b.seg.PNG", b"2"), ("a/c.txt", b""), ("v1.0/d.txt", b"4")],
    )
    assert read_all(path) == [
        {"__key__": "a/b", "__shard__": path, "jpg": b"1", "seg.png": b"2"},
        {"__key__": "a/c", "__shard__": path, "txt": b""},
        {"__key__": "v1.0/d", "__shard__": path, "txt": b"4"},
    ]


def test_what_belongs_to_no_example_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.jpg", "README", ".hidden", "__MACOSX/._a.jpg", "__meta__", "d/.b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo("a.txt")
        archive.addfile(info, io.BytesIO(b""))
    assert read_all(str(path)) == [
        {"__key__": "a", "__shard__": str(path), "jpg": b"abc", "txt": b""}
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_every_tar_format_is_read_as_webdataset_reads_it(tmp_path: Path, name: str) -> None:
    draw = random.Random(name)
    letters = string.ascii_letters + "äß€漢"
    files = []
    for index in range(40):
        # Names up to 250 characters: ustar splits them, GNU and pax add a header.
        folder = "".join(draw.choices(letters, k=draw.choice((0, 3, 30, 95))))
        key = f"{folder}/{index}" if name == "ustar" or index % 2 else f"{folder * 2}/{index}"
        for extension in draw.sample(["jpg", "TXT", "json", "seg.png"], k=draw.randint(1, 4)):
            size = draw.choice((0, 1, 511, 512, 513, 9000))
            files.append((f"{key}.{extension}", draw.randbytes(size)))
    if name == "ustar":
        files = [(n.encode("ascii", "ignore").decode()[-250:], data) for n, data in files]
        files = [(n.lstrip("/") or n, data) for n, data in files]
    path = write_tar(tmp_path / "x.tar", files, format=FORMATS[name])
    ours = read_all(path)
    assert len(ours) == 40
    assert without_shard(ours) == by_webdataset(path)


def test_shards_of_webdatasets_own_writers_are_read_alike(tmp_path: Path) -> None:
    with webdataset.ShardWriter(f"{tmp_path}/%03d.tar", maxcount=7, verbose=0) as writer:
        for index in range(20):
            writer.write(make_example(index))
    with webdataset.TarWriter(f"{tmp_path}/one.tar") as writer:
        for index in range(5):
            writer.write(make_example(index, image_format="png"))
    for path in sorted(tmp_path.glob("*.tar")):
        ours = without_shard(read_all(str(path)))
        assert len(ours) > 4
        assert ours == by_webdataset(str(path))


def test_a_size_only_pax_can_say_is_understood(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.pax_headers = {"size": "5", "path": "b.txt", "comment": "line\nbreak = 1"}
    info.size = 5
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"hello"))
    assert read_all(str(tmp_path / "x.tar"))[0]["txt"] == b"hello"
    assert read_all(str(tmp_path / "x.tar"))[0]["__key__"] == "b"


@pytest.mark.parametrize("name", FORMATS)
def test_reading_from_any_offset_gives_the_rest(tmp_path: Path, name: str) -> None:
    files = members(
        make_example(i, prefix="x" * 60 + "/" + "y" * 60 if i % 3 else "") for i in range(12)
    )
    source = TarSource(write_tar(tmp_path / "x.tar", files, format=FORMATS[name]))
    whole = list(source.read(0))
    offsets = [0, *(after for _, after in whole)]
    assert offsets == sorted(set(offsets))
    for index, offset in enumerate(offsets):
        assert list(source.read(0, offset=offset, index=index)) == whole[index:]


def test_repeated_keys_and_members_are_bad_examples_and_reading_goes_on(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        [
            *[("a.jpg", b"1"), ("a.txt", b"1")],
            *[("b.txt", b"2"), ("b.txt", b"2"), ("b.jpg", b"2")],
            *[("a.jpg", b"3"), ("a.txt", b"3")],
            *[("c.__key__", b"evil"), ("c.txt", b"4")],
            ("d.txt", b"5"),
        ],
    )
    assert reasons(path) == ["a", "duplicate_member", "duplicate_key", "duplicate_member", "d"]
    error = list(TarSource(path).read(0))[2][0]
    assert isinstance(error, BadExampleError)
    assert (error.key, error.shard) == ("a", path)


def test_the_same_key_in_another_shard_is_another_example(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_tar(tmp_path / f"{name}.tar", [("a.txt", b"1")])
    source = TarSource(f"{tmp_path}/{{x,y}}.tar")
    assert [example["__key__"] for shard in (0, 1) for example, _ in source.read(shard)] == [
        "a"
    ] * 2


def test_links_and_names_that_are_no_text_are_bad_examples(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.txt"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("c\udcff.txt"))
        archive.addfile(tarfile.TarInfo("d.txt"))
    assert reasons(str(path)) == ["a", "unsupported_member", "unreadable_key", "d"]


def test_an_example_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x" * 600), ("a.txt", b"y" * 600)])
    assert len(read_all(path, max_example_bytes=1200)) == 1
    with pytest.raises(UnsafeDataError, match=r"'a' .* 1,200 bytes .* limit is 1,199 .*'a.txt'"):
        read_all(path, max_example_bytes=1199)


def test_a_header_that_claims_a_terabyte_allocates_nothing(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(UnsafeDataError, match="1,099,511,627,776 bytes"):
        read_all(str(tmp_path / "x.tar"))


def test_a_huge_long_name_allocates_nothing(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(UnsafeDataError, match="header of 8,589,934,592 bytes"):
        read_all(str(tmp_path / "x.tar"))


def test_missing_shards_are_noticed_when_the_source_is_made(tmp_path: Path) -> None:
    write_shards(tmp_path, num_shards=2, examples_per_shard=1)
    with pytest.raises(ShardUnavailableError, match="00002.tar"):
        TarSource(f"{tmp_path}/{{00000..00002}}.tar")
    with pytest.raises(ConfigError, match=r"is a folder.*\*\.tar"):
        TarSource(tmp_path)
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(ConfigError, match="regular file"):
        TarSource(tmp_path / "fifo.tar")


def test_a_shard_that_vanishes_later_is_named(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, num_shards=1, examples_per_shard=1)
    source = TarSource(path)
    os.unlink(path)
    with pytest.raises(ShardUnavailableError, match="00000.tar"):
        list(source.read(0))


def test_a_shard_that_changed_length_since_the_source_was_made_is_an_error(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, num_shards=1, examples_per_shard=1)
    source = TarSource(path)
    write_shards(tmp_path, num_shards=1, examples_per_shard=20)
    with pytest.raises(ShardChangedError, match=r"00000\.tar"):
        list(source.read(0))
    assert len(list(TarSource(path).read(0))) == 20


def test_the_fingerprint_follows_the_data_and_not_the_folder(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_shards(tmp_path / folder, num_shards=2, examples_per_shard=2)
    write_shards(tmp_path / "c", num_shards=2, examples_per_shard=40)
    names = [TarSource(f"{tmp_path}/{folder}/*.tar").fingerprint for folder in "abc"]
    assert names[0] == names[1] != names[2]
    turned = TarSource([f"{tmp_path}/a/00001.tar", f"{tmp_path}/a/00000.tar"])
    assert turned.fingerprint != names[0]


def test_closing_a_reader_closes_its_file(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, num_shards=1)
    before = psutil.Process().num_fds()
    reader = TarSource(path).read(0)
    next(reader)
    assert psutil.Process().num_fds() == before + 1
    reader.close()  # type: ignore[attr-defined]
    assert psutil.Process().num_fds() == before
