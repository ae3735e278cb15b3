"""Files are written whole or not at all, and errors say why.

pytest tests/storage/test_writing.py
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.remote import noise, nothing_survives  # noqa: F401
from support.s3_server import S3Server

from jest_stream.config.storage import StorageConfig
from jest_stream.errors import ConfigError, ShardUnavailableError, UnsafeDataError
from jest_stream.storage.storage import Storage
from jest_stream.storage.writing import NewFile, folder_address


def test_a_file_appears_whole_when_it_is_committed(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    file = Storage().create(str(target))
    file.write(b"one ")
    file.write(b"two")
    assert not target.exists() and file.num_bytes == 7
    file.commit()
    assert target.read_bytes() == b"one two"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_an_aborted_file_leaves_the_former_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"former")
    file = Storage().create(str(tmp_path / "file"))
    file.write(b"new")
    file.abort()
    file.abort()
    assert (tmp_path / "file").read_bytes() == b"former"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_may_be_read_by_all_that_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        file = Storage().create(str(tmp_path / "file"))
        file.commit()
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_what_is_being_written_is_not_removed_as_unfinished(tmp_path: Path) -> None:
    storage = Storage()
    file = storage.create(str(tmp_path / "file"))
    (tmp_path / ".other.00.unfinished").write_bytes(b"of a process that is gone")
    storage.remove_unfinished(str(tmp_path))
    assert len(os.listdir(tmp_path)) == 1
    assert storage.names_in(str(tmp_path)) == []
    file.commit()
    assert storage.names_in(str(tmp_path)) == ["file"]


@pytest.mark.filterwarnings("ignore:unclosed file")  # of a constructor that never returned
def test_an_interrupt_at_any_line_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Ctrl-C raises wherever the program is: in a constructor, and while it cleans up too."""

    class Interrupted(BaseException):
        pass

    def write() -> None:
        file = Storage(StorageConfig()).create(f"{tmp_path}/file")
        try:
            file.write(b"new")
            file.commit()
        finally:
            file.abort()

    def interrupted_at(line: int) -> bool:
        """Whether that many lines of `NewFile` ran before the end."""
        left = line

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if not isinstance(frame.f_locals.get("self"), NewFile):
                return None
            left -= event == "line"
            if event == "line" and left < 0:
                sys.settrace(None)
                raise Interrupted
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            write()
        except Interrupted:
            return True
        finally:
            sys.settrace(before)
        return False

    line = 0
    while interrupted_at(line):
        assert {path.name for path in tmp_path.iterdir()} <= {"file"}, line
        line += 1
    assert line > 20 and (tmp_path / "file").read_bytes() == b"new"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = Storage().create(str(tmp_path / "file"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot write '.*file': File too large. Make room"):
            for _ in range(1000):
                file.write(bytes(1024))
            file.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.abort()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write '.*taken/file'"):
        Storage().create(str(tmp_path / "taken" / "file"))
    with pytest.raises(ConfigError, match="cannot be used as a folder"):
        Storage().names_in(str(tmp_path / "taken"))
    assert Storage().names_in(str(tmp_path / "none")) == []


@pytest.mark.parametrize("url", ["http://host/a", "https://host/a", "hf://datasets/o/n/a"])
def test_what_is_only_read_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is only read. Write to a local folder"):
        Storage().create(url)


def test_addresses_of_folders_are_checked() -> None:
    assert folder_address("s3://bucket/a/") == "s3://bucket/a"
    assert folder_address("file:///tmp/a") == "/tmp/a"
    assert folder_address("/") == "/"
    with pytest.raises(ConfigError, match="names one file, not a folder"):
        folder_address("https://host/a?signature=secret")
    with pytest.raises(UnsafeDataError):
        folder_address("pipe:cat")


def test_mapped_bytes_are_those_of_the_file_and_hold_no_descriptor(tmp_path: Path) -> None:
    data = noise(100_000)
    (tmp_path / "file").write_bytes(data)
    mapped = Storage().mapped(str(tmp_path / "file"))
    open_files = [
        os.readlink(f"/proc/self/fd/{n}")
        for n in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{n}")
    ]
    assert str(tmp_path / "file") not in open_files
    assert mapped.tobytes() == data
    mapped[:10] = 0  # ours alone
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.timeout(240)
def test_objects_are_put_whole_in_parts_too(s3: S3Server, tmp_path: Path) -> None:
    storage = Storage(StorageConfig(options=s3.options))
    bucket = s3.make_bucket()
    data = noise(10_000) * 12_000  # 120 MB: s3fs uploads more than 100 MiB in parts
    for name, content in (("small", data[:1000]), ("large", data), ("empty", b"")):
        url = f"s3://{bucket}/folder/{name}"
        file = storage.create(url)
        for start in range(0, len(content), 1 << 24):
            file.write(content[start : start + (1 << 24)])
        assert name not in storage.names_in(f"s3://{bucket}/folder")
        file.commit()
        with storage.open(url) as stored:
            assert stored.read() == content
    assert storage.names_in(f"s3://{bucket}/folder") == ["empty", "large", "small"]
    assert storage.mapped(f"s3://{bucket}/folder/small").tobytes() == data[:1000]
    storage.close()


def test_a_store_that_does_not_answer_or_refuses_is_named(s3: S3Server) -> None:
    config = StorageConfig(
        options=s3.options, retry_timeout_s=1, connect_timeout_s=1, stall_timeout_s=1
    )
    storage, bucket = Storage(config), s3.make_bucket()
    wrong = {"s3": {**s3.options["s3"], "secret": "another-secret"}}
    stranger = Storage(StorageConfig(options=wrong))
    file = stranger.create(f"s3://{bucket}/a")
    with pytest.raises(ShardUnavailableError, match="cannot write 's3://.*403") as refused:
        file.commit()
    assert refused.value.attempts == 1 and "another-secret" not in str(refused.value)
    stranger.close()
    file = storage.create(f"s3://{bucket}/a")
    file.write(b"data")
    s3.kill()
    try:
        with pytest.raises(ShardUnavailableError, match=r"cannot write .*attempts.*whole") as gone:
            file.commit()
    finally:
        s3.start()
    assert gone.value.attempts > 1
    storage.close()
