"""Every way in which a shard can be broken is a named error, after the examples before it.

On local disk, on a web server, in an object store and on the Hub alike. tarfile, webdataset and
datasets take most of these for a shorter shard.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fault_server import FaultServer
from support.hub_server import HubServer
from support.leaks import nothing_left_behind
from support.remote import nothing_survives, start_loop  # noqa: F401
from support.s3_server import S3Server
from support.shards import make_example, members, write_tar

from jest_stream.config.storage import StorageConfig
from jest_stream.errors import BadExampleError, JESTError, ShardError, ShardTruncatedError
from jest_stream.sources.tar import TarSource

# Three examples of two members, each member one block of header and one of data: an example is
# 2,048 bytes, the end marker is at 6,144, and the file is padded to 10,240.
EXAMPLE, MARKER, SIZE = 2048, 6144, 10240

Put = Callable[[bytes], TarSource]


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> str:
    """A bucket of this module; starts the S3 server."""
    server: S3Server = request.getfixturevalue("s3")
    name = server.make_bucket()
    source = TarSource(server.put(name, "first.tar", b""), storage=server.config)
    source.close()  # helper threads of fsspec stay after its first use and are no leak
    return name


@pytest.fixture(params=["local", "http", "s3", "hub"])
def put(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Put]:
    """Puts the bytes of a shard somewhere and returns a source that reads them there."""
    if request.param == "local":

        def put_local(data: bytes) -> TarSource:
            (tmp_path / "shard.tar").write_bytes(data)
            return TarSource(tmp_path / "shard.tar")

        yield put_local
        return
    start_loop()  # its threads stay
    if request.param == "http":
        with FaultServer({}) as web:

            def put_http(data: bytes) -> TarSource:
                web.replace("shard.tar", data)
                return TarSource(web.url("shard.tar"))

            yield put_http
        return
    if request.param == "hub":
        with HubServer() as hub:
            config = StorageConfig(options={"hf": {"endpoint": hub.url}})

            def put_hub(data: bytes) -> TarSource:
                hub.put("acme/faults", {"shard.tar": data})
                return TarSource("hf://datasets/acme/faults/shard.tar", storage=config)

            put_hub(b"").close()  # huggingface_hub keeps a session for the process
            yield put_hub
        return
    server: S3Server = request.getfixturevalue("s3")
    bucket: str = request.getfixturevalue("bucket")

    def put_s3(data: bytes) -> TarSource:
        return TarSource(server.put(bucket, f"{tmp_path.name}.tar", data), storage=server.config)

    yield put_s3


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    files = [(f"{i}.{kind}", kind.encode() * 9) for i in range(3) for kind in ("jpg", "txt")]
    data = Path(write_tar(tmp_path / "whole.tar", files)).read_bytes()
    assert len(data) == SIZE
    return data


def keys_of(source: TarSource) -> list[str]:
    return [example["__key__"] for example, _ in source.read(0) if isinstance(example, dict)]


def fails(put: Put, data: bytes, kind: type[JESTError]) -> tuple[list[str], JESTError]:
    """Reads a broken shard; returns the keys before the error, and the error."""
    keys = []
    with nothing_left_behind():
        source = put(data)
        name = source.shard_name(0)
        with pytest.raises(kind, match=re.escape(name)) as raised:
            for example, _ in source.read(0):
                assert not isinstance(example, BadExampleError)
                keys.append(example["__key__"])
        source.close()
    assert type(raised.value) is kind
    assert raised.value.shard == name  # type: ignore[attr-defined]
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
def test_a_shard_cut(put: Put, whole: bytes, where: str) -> None:
    size, keys_before, offset = CUTS[where]
    keys, error = fails(put, whole[:size], ShardTruncatedError)
    assert keys == keys_before
    assert error.offset == offset  # type: ignore[attr-defined]
    assert f"ends at byte {size} " in str(error)


def test_a_shard_may_end_right_after_its_marker(put: Put, whole: bytes) -> None:
    source = put(whole[: MARKER + 1024])
    assert keys_of(source) == ["0", "1", "2"]
    source.close()


def test_zeros_in_place_of_data_that_never_came(put: Put, whole: bytes) -> None:
    keys, error = fails(put, whole[: 2 * EXAMPLE] + bytes(SIZE), ShardTruncatedError)
    assert keys == ["0", "1"]
    assert "zeros from byte 4096" in str(error)


@pytest.mark.parametrize("factor", [1, 2, 20, 32, 64, 512, 2048])
def test_padding_of_every_usual_blocking_factor_is_no_damage(tmp_path: Path, factor: int) -> None:
    for name in ("0.jpg", "0.txt", "1.jpg", "1.txt"):
        (tmp_path / name).write_bytes(b"x" * 700)
    path = tmp_path / "x.tar"
    program = ["tar", "-b", str(factor), "-C", str(tmp_path), "-cf", str(path)]
    subprocess.run([*program, "0.jpg", "0.txt", "1.jpg", "1.txt"], check=True)
    assert path.stat().st_size == max(14, factor) * 512 or factor == 20
    assert keys_of(TarSource(path)) == ["0", "1"]


# Where a download into reserved space stopped, and how long the file was to be.
@pytest.mark.parametrize("size", [20_480, 102_400, 1_000_448, 5 << 20, 10 << 20])
def test_reserved_space_is_no_padding_at_any_usual_length(
    tmp_path: Path, whole: bytes, size: int
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes((whole[:EXAMPLE] + bytes(size))[:size])
    with pytest.raises(ShardTruncatedError, match=r"too many to be padding .*manifest"):
        keys_of(TarSource(path))


def test_a_known_number_of_examples_tells_padding_from_reserved_space(
    tmp_path: Path, whole: bytes
) -> None:
    (tmp_path / "m.json").write_text('{"x.tar": 3}')
    (tmp_path / "x.tar").write_bytes(whole + bytes(123_000 * 512))
    assert keys_of(TarSource(tmp_path / "m.json")) == ["0", "1", "2"]
    (tmp_path / "x.tar").write_bytes(whole[: 2 * EXAMPLE] + bytes(MARKER))
    with pytest.raises(ShardError, match=r"holds 2 examples, its manifest promises 3"):
        keys_of(TarSource(tmp_path / "m.json"))


def test_a_garbage_header(put: Put, whole: bytes) -> None:
    garbage = bytes(range(256)) * 2
    data = whole[:EXAMPLE] + garbage + whole[EXAMPLE + 512 :]
    keys, error = fails(put, data, ShardError)
    assert keys == []
    assert error.offset == EXAMPLE  # type: ignore[attr-defined]


def test_one_changed_bit_of_a_header(put: Put, whole: bytes) -> None:
    data = bytearray(whole)
    data[EXAMPLE + 3] ^= 1
    assert "checksum" in str(fails(put, bytes(data), ShardError)[1])


def test_a_single_empty_block_is_no_end(put: Put, whole: bytes) -> None:
    data = whole[:EXAMPLE] + bytes(512) + whole[EXAMPLE:]
    keys, error = fails(put, data, ShardError)
    assert "single empty block" in str(error)
    assert error.offset == EXAMPLE  # type: ignore[attr-defined]


def test_joined_archives(put: Put, whole: bytes) -> None:
    keys, error = fails(put, whole + whole, ShardError)
    assert keys == ["0", "1", "2"]
    assert "after its end-of-archive marker" in str(error)


def test_bytes_after_the_marker(put: Put, whole: bytes) -> None:
    keys, _ = fails(put, whole[:-1] + b"x", ShardError)
    assert keys == ["0", "1", "2"]


OTHER_FORMATS = {
    "an HTML error page": (b"\n <!DOCTYPE html><html><body>404 Not Found</body></html>", "HTML"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "git lfs"),
    "a zip file": (b"PK\x03\x04", "zip"),
    "a Parquet file": (b"PAR1\x15\x04", "Parquet"),
    "random bytes": (b"\x93NUMPY", "no format known"),
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_another_file_that_is_called_tar(put: Put, name: str) -> None:
    start, named = OTHER_FORMATS[name]
    keys, error = fails(put, start.ljust(2000, b"x"), ShardError)
    assert keys == []
    assert named in str(error)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compression_is_not_undone_in_silence(
    put: Put, tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    many = write_tar(tmp_path / "many.tar", members(make_example(i) for i in range(30)))
    error = fails(put, compress(Path(many).read_bytes()), ShardError)[1]
    assert "not unpacked here; run" in str(error)


def with_header(whole: bytes, **fields: object) -> bytes:
    """Returns the shard with another header, checksum right, in front."""
    info = tarfile.TarInfo("x.jpg")
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT) + whole


@pytest.mark.parametrize("size", [512, EXAMPLE])
@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_size_in_a_header_without_data_hides_no_example(
    put: Put, whole: bytes, kind: bytes, size: int
) -> None:
    data = with_header(whole[: MARKER + 1024], name="folder", type=kind, size=size)
    source = put(data)
    assert keys_of(source) == ["0", "1", "2"]
    source.close()


def test_sparse_members_are_refused(put: Put, whole: bytes) -> None:
    error = fails(put, with_header(whole, type=tarfile.GNUTYPE_SPARSE), ShardError)[1]
    assert "sparse" in str(error)


def test_a_negative_size_is_refused(put: Put, whole: bytes) -> None:
    header = bytearray(with_header(b""))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    error = fails(put, bytes(header) + whole, ShardError)[1]
    assert "negative size" in str(error)


@pytest.mark.parametrize(
    "records",
    [b"99 path=x\n", b"0 a=b\n", b"x a=b\n", b"10 path=x.", b"7 a\n", b"13 size=-1\n", b"11 a=b\n"],
)
def test_a_broken_pax_header(put: Put, whole: bytes, records: bytes) -> None:
    extension = with_header(b"", type=tarfile.XHDTYPE, size=len(records))
    fails(put, extension + records.ljust(512, b"\0") + whole, ShardError)


def test_an_offset_that_is_no_header_is_noticed(put: Put, whole: bytes) -> None:
    source = put(whole)
    with pytest.raises(ShardError, match="no tar header at byte 520"):
        list(source.read(0, offset=520, index=1))
    with pytest.raises(ShardTruncatedError):
        list(source.read(0, offset=5 * SIZE, index=1))
    source.close()
