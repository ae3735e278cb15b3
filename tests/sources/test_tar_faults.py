"""Every way in which a shard can be broken is a named error, after the examples before it.

tarfile, webdataset and datasets take most of these for a shorter shard.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
from pathlib import Path

import psutil
import pytest
from shards import make_example, members, write_tar

from jest_stream.errors import JESTError, ShardError, ShardTruncatedError
from jest_stream.sources import TarSource

# Three examples of two members, each member one block of header and one of data: an example is
# 2,048 bytes, the end marker is at 6,144, and the file is padded to 10,240.
EXAMPLE, MARKER, SIZE = 2048, 6144, 10240


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    files = [(f"{i}.{kind}", kind.encode() * 9) for i in range(3) for kind in ("jpg", "txt")]
    data = Path(write_tar(tmp_path / "whole.tar", files)).read_bytes()
    assert len(data) == SIZE
    return data


def fails(tmp_path: Path, data: bytes, kind: type[JESTError]) -> tuple[list[str], JESTError]:
    """Reads a broken shard; returns the keys before the error, and the error."""
    path = tmp_path / "broken.tar"
    path.write_bytes(data)
    num_fds = psutil.Process().num_fds()
    keys = []
    with pytest.raises(kind, match=re.escape(str(path))) as raised:
        for example, _ in TarSource(path).read(0):
            keys.append(example["__key__"])
    assert type(raised.value) is kind
    assert raised.value.shard == str(path)  # type: ignore[attr-defined]
    assert psutil.Process().num_fds() == num_fds
    return keys, raised.value


#   where it is cut                    bytes kept     keys before    offset of the error
CUTS = {
    "at a boundary of examples": (EXAMPLE, [], EXAMPLE),  # the first may have lost a member
    "at a later boundary": (2 * EXAMPLE, ["0"], 2 * EXAMPLE),
    "between two members": (EXAMPLE + 1024, ["0"], EXAMPLE + 1024),
    "within a header": (EXAMPLE + 100, [], EXAMPLE),
    "within the header of a second member": (EXAMPLE + 1024 + 511, ["0"], EXAMPLE + 1024),
    "within data": (EXAMPLE + 512 + 5, ["0"], EXAMPLE + 512 + 5),
    "within padding": (EXAMPLE + 512 + 100, ["0"], EXAMPLE + 512 + 100),
    "before the marker": (MARKER, ["0", "1"], MARKER),
    "within the marker": (MARKER + 512, ["0", "1"], MARKER),
    "within the marker's second block": (MARKER + 1000, ["0", "1"], MARKER),
    "to nothing": (0, [], 0),
}


@pytest.mark.parametrize("where", CUTS)
def test_a_shard_cut(tmp_path: Path, whole: bytes, where: str) -> None:
    size, keys_before, offset = CUTS[where]
    keys, error = fails(tmp_path, whole[:size], ShardTruncatedError)
    assert keys == keys_before
    assert error.offset == offset  # type: ignore[attr-defined]
    assert f"ends at byte {size} " in str(error)


def test_a_shard_may_end_right_behind_its_marker(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "short.tar"
    path.write_bytes(whole[: MARKER + 1024])
    assert len(list(TarSource(path).read(0))) == 3


def test_zeros_in_place_of_data_that_never_came(tmp_path: Path, whole: bytes) -> None:
    keys, error = fails(tmp_path, whole[: 2 * EXAMPLE] + bytes(SIZE), ShardTruncatedError)
    assert keys == ["0", "1"]
    assert "zeros from byte 4096" in str(error)


def test_a_garbage_header(tmp_path: Path, whole: bytes) -> None:
    garbage = bytes(range(256)) * 2
    data = whole[:EXAMPLE] + garbage + whole[EXAMPLE + 512 :]
    keys, error = fails(tmp_path, data, ShardError)
    assert keys == []
    assert error.offset == EXAMPLE  # type: ignore[attr-defined]


def test_one_changed_bit_of_a_header(tmp_path: Path, whole: bytes) -> None:
    data = bytearray(whole)
    data[EXAMPLE + 3] ^= 1
    assert "checksum" in str(fails(tmp_path, bytes(data), ShardError)[1])


def test_a_single_empty_block_is_no_end(tmp_path: Path, whole: bytes) -> None:
    data = whole[:EXAMPLE] + bytes(512) + whole[EXAMPLE:]
    keys, error = fails(tmp_path, data, ShardError)
    assert "single empty block" in str(error)
    assert error.offset == EXAMPLE  # type: ignore[attr-defined]


def test_joined_archives(tmp_path: Path, whole: bytes) -> None:
    keys, error = fails(tmp_path, whole + whole, ShardError)
    assert keys == ["0", "1", "2"]
    assert "behind its end-of-archive marker" in str(error)


def test_bytes_behind_the_marker(tmp_path: Path, whole: bytes) -> None:
    keys, _ = fails(tmp_path, whole[:-1] + b"x", ShardError)
    assert keys == ["0", "1", "2"]


OTHER_FORMATS = {
    "an HTML error page": (b"\n <!DOCTYPE html><html><body>404 Not Found</body></html>", "HTML"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git lfs"),
    "a zip file": (b"PK\x03\x04", "zip"),
    "random bytes": (b"\x93NUMPY", "no format known"),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_another_file_that_is_called_tar(tmp_path: Path, name: str) -> None:
    start, named = OTHER_FORMATS[name]
    keys, error = fails(tmp_path, start.ljust(2000, b"x"), ShardError)
    assert keys == []
    assert named in str(error)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compression_is_not_undone_in_silence(tmp_path: Path, whole: bytes, compress) -> None:
    many = write_tar(tmp_path / "many.tar", members(make_example(i) for i in range(30)))
    error = fails(tmp_path, compress(Path(many).read_bytes()), ShardError)[1]
    assert "not unpacked here; run" in str(error)


def with_header(whole: bytes, **fields: object) -> bytes:
    """Returns the shard with another header, checksum right, in front."""
    info = tarfile.TarInfo("x.jpg")
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT) + whole


def test_sparse_members_are_refused(tmp_path: Path, whole: bytes) -> None:
    error = fails(tmp_path, with_header(whole, type=tarfile.GNUTYPE_SPARSE), ShardError)[1]
    assert "sparse" in str(error)


def test_a_negative_size_is_refused(tmp_path: Path, whole: bytes) -> None:
    header = bytearray(with_header(b""))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    error = fails(tmp_path, bytes(header) + whole, ShardError)[1]
    assert "negative size" in str(error)


@pytest.mark.parametrize(
    "records",
    [b"99 path=x\n", b"0 a=b\n", b"x a=b\n", b"10 path=x.", b"7 a\n", b"13 size=-1\n", b"11 a=b\n"],
)
def test_a_broken_pax_header(tmp_path: Path, whole: bytes, records: bytes) -> None:
    extension = with_header(b"", type=tarfile.XHDTYPE, size=len(records))
    fails(tmp_path, extension + records.ljust(512, b"\0") + whole, ShardError)


def test_an_offset_that_is_no_header_is_noticed(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    with pytest.raises(ShardError, match="no tar header at byte 520"):
        list(TarSource(path).read(0, offset=520, index=1))
    with pytest.raises(ShardTruncatedError):
        list(TarSource(path).read(0, offset=5 * SIZE, index=1))
