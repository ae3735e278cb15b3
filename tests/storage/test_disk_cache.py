"""The disk cache is bounded, holds whole entries only, and downloads once for many processes.

pytest tests/storage/test_disk_cache.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support.cache_child import content_of
from support.leaks import no_leaks  # noqa: F401

from jest_stream.errors import ConfigError, ShardChangedError, StalledError
from jest_stream.storage.disk_cache import DiskCache

pytestmark = pytest.mark.usefixtures("no_leaks")

CHILD = str(Path(__file__).parents[1] / "support" / "cache_child.py")
SIZE = 1000


class Child:
    """A process with a cache: see `cache_child.py`."""

    def __init__(self, folder: Path, limit: int, *before: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*before, sys.executable, "-W", "error", CHILD, str(folder), str(limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def say(self, **command: object) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            with suppress(BrokenPipeError):
                stream.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    """Starts children that end with the test."""
    children: list[Child] = []

    def start_one(folder: Path, limit: int = 1 << 20, *before: str, **environment: str) -> Child:
        children.append(Child(folder, limit, *before, **environment))
        return children[-1]

    yield start_one
    for child in children:
        child.end()


def cache_at(folder: Path, limit_bytes: int = 1 << 20, stall_s: float = 20) -> DiskCache:
    return DiskCache(folder, limit_bytes=limit_bytes, stall_s=stall_s)


def downloads(url: str, size: int = SIZE, log: list[str] | None = None) -> Callable[[], Generator]:
    """Returns a download of a shard, in two parts; notes each in `log`."""

    def download() -> Generator[bytes, None, None]:
        if log is not None:
            log.append(url)
        data = content_of(url, size)
        yield data[: size // 2]
        yield data[size // 2 :]

    return download


def get(cache: DiskCache, url: str, size: int = SIZE, log: list[str] | None = None) -> bytes | None:
    """Returns the shard's bytes through the cache, and closes it."""
    file = cache.open(url, size, "v1", downloads(url, size, log))
    if file is None:
        return None
    with file:
        return file.read()


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "folder.lock")


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_shard_is_downloaded_once_and_read_again_and_again(tmp_path: Path) -> None:
    log: list[str] = []
    cache = cache_at(tmp_path / "new" / "cache")
    for _ in range(3):
        assert get(cache, "s3://b/x.tar", log=log) == content_of("s3://b/x.tar", SIZE)
    assert get(cache_at(tmp_path / "new" / "cache"), "s3://b/x.tar", log=log)
    assert log == ["s3://b/x.tar"]
    assert cache.take_counts() == {"cache_misses": 1, "cache_hits": 2}
    assert cache.take_counts() == {}


def test_the_file_can_be_sought(tmp_path: Path) -> None:
    data = content_of("u", SIZE)
    cache = cache_at(tmp_path)
    for _ in ("downloaded", "found"):
        with cache.open("u", SIZE, "v1", downloads("u")) as file:  # type: ignore[union-attr]
            assert file.seek(700) == 700 and file.read(5) == data[700:705]
            assert file.seek(0, os.SEEK_END) == SIZE


def test_another_version_length_or_address_is_another_entry(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    for url, size, version in (
        ("s3://a/x.tar", SIZE, "1"),
        ("s3://a/x.tar", SIZE, "2"),
        ("s3://a/x.tar", SIZE + 1, "1"),
        ("s3://b/x.tar", SIZE, "1"),
    ):
        cache.open(url, size, version, downloads(url, size)).close()  # type: ignore[union-attr]
    assert len(entries(tmp_path)) == cache.take_counts()["cache_misses"] == 4


def test_names_are_hashes_so_that_no_address_leads_out_of_the_folder(tmp_path: Path) -> None:
    get(cache_at(tmp_path / "cache"), "s3://b/../../../../tmp/evil?X-Amz-Signature=secret")
    (name,) = entries(tmp_path / "cache")
    assert len(name) == 32 + len(".shard") and name.isascii() and "/" not in name
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_was_used_longest_ago_is_evicted_first(tmp_path: Path) -> None:
    log: list[str] = []
    cache = cache_at(tmp_path, limit_bytes=3 * SIZE)
    for url in "abcadaeb":  # d evicts b, e evicts c, b evicts d
        assert get(cache, url, log=log) == content_of(url, SIZE)
        assert bytes_in(tmp_path) <= 3 * SIZE
    assert log == list("abcdeb")
    assert cache.take_counts() == {"cache_misses": 6, "cache_hits": 2, "cache_evictions": 3}


def test_what_is_being_read_is_never_evicted(tmp_path: Path) -> None:
    log: list[str] = []
    cache = cache_at(tmp_path, limit_bytes=2 * SIZE)
    reading = cache.open("a", SIZE, "v1", downloads("a", log=log))
    assert reading is not None
    with reading:
        for url in "bcd":
            assert get(cache, url, log=log)
        assert reading.read() == content_of("a", SIZE)
        assert get(cache, "a", log=log)
    assert log == list("abcd")
    assert cache.take_counts()["cache_evictions"] == 2


def test_what_another_process_reads_is_never_evicted(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    child = start(tmp_path)
    assert child.hear() == "ready"
    child.say(url="a", size=SIZE)
    assert child.hear() == "half" and child.hear().startswith("opened")
    log: list[str] = []
    cache = cache_at(tmp_path, limit_bytes=2 * SIZE)
    for url in "bcda":
        assert get(cache, url, log=log)
    assert log == list("bcd")
    child.end()  # and with the process the lock is gone
    for url in "ef":
        assert get(cache, url)
    assert get(cache, "a", log=log) and log == list("bcda")


def test_without_room_beside_what_is_being_read_the_cache_stands_aside(tmp_path: Path) -> None:
    cache = cache_at(tmp_path, limit_bytes=2 * SIZE)
    files = [cache.open(url, SIZE, "v1", downloads(url)) for url in "abc"]
    assert [file is None for file in files] == [False, False, True]
    assert cache.take_counts() == {"cache_misses": 2, "cache_bypasses": 1}
    for file in files[:2]:
        file.close()  # type: ignore[union-attr]
    assert get(cache, "c") == content_of("c", SIZE)
    assert bytes_in(tmp_path) == 2 * SIZE


def test_a_limit_below_one_shard_is_refused(tmp_path: Path) -> None:
    cache = cache_at(tmp_path, limit_bytes=SIZE - 1)
    with pytest.raises(ConfigError, match=r"cache_bytes=999 .*'s3://b/x.tar\?\[hidden\]'.* 1,000"):
        get(cache, "s3://b/x.tar?token=abc")
    assert entries(tmp_path) == []


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    mine = ["notes.txt", "0.shard", "a" * 32 + ".tar", "A" * 32 + ".shard"]
    for name in mine:
        (tmp_path / name).write_bytes(bytes(5000))
    cache = cache_at(tmp_path, limit_bytes=SIZE)
    for url in "abc":
        assert get(cache, url)
    assert set(mine) < set(entries(tmp_path))


def test_many_processes_download_a_shard_once(tmp_path: Path, start: Callable[..., Child]) -> None:
    children = [start(tmp_path) for _ in range(4)]
    for child in children:
        assert child.hear() == "ready"
    first, *others = children
    first.say(url="a", size=SIZE, pause=True)
    assert first.hear() == "half"
    for child in others:
        child.say(url="a", size=SIZE)
    first.say()
    counts = [child.hear() for child in children]  # nobody else says half
    assert counts[0] == 'opened {"cache_misses": 1}'
    assert counts[1:] == ['opened {"cache_hits": 1}'] * 3


def test_processes_at_a_small_cache_never_see_a_wrong_byte(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    children = [start(tmp_path, 4 * SIZE) for _ in range(3)]
    for number, child in enumerate(children):
        for step in range(60):  # each in another order; the child checks the bytes that it reads
            child.say(url=f"u{(step * (number + 1)) % 7}", size=SIZE - step % 2)
        assert child.process.stdin
        child.process.stdin.close()
    for child in children:
        assert child.process.stdout
        lines = child.process.stdout.read().split("\n")
        assert sum(line.startswith("opened") for line in lines) == 60
        assert child.process.wait(10) == 0
    assert bytes_in(tmp_path) <= 4 * SIZE
    assert not list(tmp_path.glob("*.part"))


def test_a_process_killed_while_downloading_leaves_no_bad_entry(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    for url in ("a", "b"):
        child = start(tmp_path)
        assert child.hear() == "ready"
        child.say(url=url, size=SIZE, pause=True)
        assert child.hear() == "half"
        child.end()
        assert [path.suffix for path in tmp_path.iterdir()].count(".part") == 1
        log: list[str] = []
        # The same shard is begun again; for another one, the rest is removed.
        assert get(cache_at(tmp_path), "a", log=log) == content_of("a", SIZE)
        assert log == (["a"] if url == "a" else [])
        assert len(entries(tmp_path)) == 1 and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("size", "found"), [(SIZE // 2, "gave 500"), (SIZE + 1, "gave 1,001 and more")]
)
def test_a_download_of_another_length_is_no_entry(tmp_path: Path, size: int, found: str) -> None:
    cache = cache_at(tmp_path)
    with pytest.raises(ShardChangedError, match=f"1,000 bytes; its download {found}"):
        cache.open("s3://b/x.tar", SIZE, "v1", downloads("s3://b/x.tar", size))
    assert entries(tmp_path) == []
    assert get(cache, "s3://b/x.tar")


def test_a_failed_download_leaves_nothing_open_or_behind(tmp_path: Path) -> None:
    def download() -> Generator[bytes, None, None]:
        yield b"x" * 10
        raise KeyboardInterrupt

    cache = cache_at(tmp_path)
    num_fds = psutil.Process().num_fds()
    with pytest.raises(KeyboardInterrupt):
        cache.open("u", SIZE, "v1", download)
    assert entries(tmp_path) == []
    assert psutil.Process().num_fds() == num_fds


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_an_entry_that_was_cut_is_downloaded_again(tmp_path: Path, size: int) -> None:
    cache = cache_at(tmp_path)
    get(cache, "a")
    os.truncate(tmp_path / entries(tmp_path)[0], size)
    log: list[str] = []
    assert get(cache, "a", log=log) == content_of("a", SIZE)
    assert log == ["a"]


def test_a_download_of_another_process_that_hangs_is_an_error_in_time(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    child = start(tmp_path)
    assert child.hear() == "ready"
    child.say(url="a", size=SIZE, pause=True)
    assert child.hear() == "half"
    with pytest.raises(StalledError, match=r"written nothing for 0\.2 s \(500 of 1,000 bytes\)"):
        get(cache_at(tmp_path, stall_s=0.2), "a")
    child.say()
    assert child.hear() == 'opened {"cache_misses": 1}'
    assert get(cache_at(tmp_path), "a") == content_of("a", SIZE)


def test_a_folder_that_cannot_be_written_is_named_at_once(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cache_folder='.*/file/cache' cannot be used: .* fix"):
        cache_at(tmp_path / "file" / "cache")
    if os.geteuid() == 0:  # root may write everywhere
        shown = tmp_path.parent
        while not shown.stat().st_mode & 0o001 and shown != shown.parent:
            shown.chmod(shown.stat().st_mode | 0o001)
            shown = shown.parent
        child = start(tmp_path, AS_NOBODY="1")
    else:
        tmp_path.chmod(0o555)
        child = start(tmp_path)
    answer = child.hear()
    assert answer.startswith(f"failed ConfigError cache_folder={str(tmp_path)!r}")
    assert "Permission denied" in answer and "leave cache_folder out" in answer


def test_a_file_size_limit_is_explained_and_leaves_nothing(
    tmp_path: Path, start: Callable[..., Child]
) -> None:
    child = start(tmp_path, FILE_LIMIT="700")
    assert child.hear() == "ready"
    child.say(url="s3://b/x.tar", size=SIZE)
    assert child.hear() == "half"
    answer = child.hear()
    assert f"cache_folder={str(tmp_path)!r} cannot take shard 's3://b/x.tar': File too" in answer
    assert entries(tmp_path) == []


def can_mount() -> bool:
    program = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if not shutil.which("unshare"):
        return False
    return subprocess.run(program, capture_output=True).returncode == 0


def test_a_full_disk_is_explained(tmp_path: Path, start: Callable[..., Child]) -> None:
    if not can_mount():
        pytest.skip("needs to mount a small tmpfs, which only root may")
    # In a mount namespace of its own: the small disk is gone with the process.
    mount = f'mount -t tmpfs -o size=64k tmpfs {tmp_path} && exec "$@"'
    child = start(tmp_path, 1 << 20, "unshare", "--mount", "sh", "-c", mount, "sh")
    assert child.hear() == "ready"
    child.say(url="a", size=40_000)
    assert child.hear() == "half" and child.hear().startswith("opened")
    child.say(url="s3://b/x.tar", size=40_000)
    answers = [child.hear(), child.hear()]
    answer = next(line for line in answers if line.startswith("failed"))
    assert "cannot take shard 's3://b/x.tar': No space left on device" in answer
    assert "cache_bytes is 1,048,576: free some, lower cache_bytes" in answer
