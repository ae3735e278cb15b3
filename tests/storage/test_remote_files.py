"""Remote files behave as files do: exact, seekable, within their budget, closed without a trace.

pytest tests/storage/test_remote_files.py
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
from fsspec.asyn import get_loop
from support.fault_server import FaultServer
from support.faults import Fault
from support.leaks import stop_helpers
from support.models import to_tensor, tokenize
from support.remote import AT_ONCE, SOON, noise, nothing_survives, until  # noqa: F401
from support.shards import write_shards

from jest_stream import JESTDataset, SelectionConfig
from jest_stream.config.storage import StorageConfig
from jest_stream.errors import ConfigError, ShardUnavailableError
from jest_stream.storage.storage import Storage
from jest_stream.types import ObjectInfo

DATA = noise(12_000_000)
KNOWN = ObjectInfo(len(DATA))
MIB = 1 << 20


def test_every_byte_arrives_once() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage()
        with storage.open(server.url("a.tar")) as file:
            assert file.read() == DATA
            assert file.read(1) == b""
        counts = storage.take_counts()
        storage.close()
        assert counts == {"storage_bytes": len(DATA), "storage_requests": len(server.requests)}
        assert storage.take_counts() == {}


def test_seeking_within_what_is_buffered_asks_for_nothing() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage()
        with storage.open(server.url("a.tar")) as file:
            file.read()
            num_requests = len(server.requests)
            for position in (0, 5_000_000, 11_999_999, 3):
                file.seek(position)
                assert file.read(100) == DATA[position : position + 100]
            assert len(server.requests) == num_requests
        storage.close()


def test_reading_from_the_middle_does_not_read_what_is_before_it() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage()
        with storage.open(server.url("a.tar"), storage.info(server.url("a.tar"))) as file:
            file.seek(-1000, os.SEEK_END)
            assert file.read() == DATA[-1000:]
        assert storage.take_counts()["storage_bytes"] == 1000
        storage.close()


def test_a_file_can_be_used_as_any_binary_file() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage()
        file = storage.open(server.url("a.tar"))
        assert file.readable() and file.seekable() and not file.writable()
        assert isinstance(file, io.BufferedReader) and file.name == server.url("a.tar")
        assert file.seek(10) == 10 and file.seek(5, os.SEEK_CUR) == 15 and file.tell() == 15
        buffer = bytearray(7)
        assert file.readinto(buffer) == 7 and bytes(buffer) == DATA[15:22]
        assert file.peek(1)[:1] == DATA[22:23]
        assert file.seek(100, os.SEEK_END) == len(DATA) + 100 and file.read(1) == b""
        with pytest.raises(ValueError, match="before the start"):
            file.seek(-1)
        assert "1 remote files open" in repr(storage)
        file.close()
        file.close()
        with pytest.raises(ValueError, match="closed"):
            file.read(1)
        assert repr(storage) == "<Storage 0 remote files open | 0.0 MiB read ahead>"
        storage.close()


def test_an_empty_object_is_an_empty_file() -> None:
    with FaultServer({"a.tar": b""}) as server:
        storage = Storage(SOON)
        assert storage.info(server.url("a.tar")).num_bytes == 0
        with storage.open(server.url("a.tar")) as file:
            assert file.read() == b""
        storage.close()


def test_any_reads_of_any_files_give_the_right_bytes_within_the_budget() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        for seed in range(12):
            generator = random.Random(seed)
            num_files, limit = generator.randint(1, 12), generator.randint(1, 8) * MIB
            storage = Storage(StorageConfig(read_ahead_bytes=limit))
            files = [storage.open(server.url("a.tar"), KNOWN) for _ in range(num_files)]
            for _ in range(40):
                file = generator.choice(files)
                if generator.random() < 0.3:
                    file.seek(generator.randrange(len(DATA) + 10))
                start, length = file.tell(), generator.choice((1, 512, 4000, 300_000, 2_000_000))
                assert file.read(length) == DATA[start : start + length], seed
                # Each file may have one segment of 64 KiB even where all is taken.
                assert storage._resources().read_ahead.used_bytes <= limit + num_files * 65536, seed
            storage.close()
            assert all(file.closed for file in files)


def serve_large(pipe: Connection, num_files: int, num_bytes: int) -> None:
    """A server of its own, so that its memory does not count."""
    data = noise(MIB) * (num_bytes // MIB)
    with FaultServer({f"{k}.tar": data for k in range(num_files)}) as server:
        pipe.send([server.url(f"{k}.tar") for k in range(num_files)])
        pipe.recv()


def test_64_open_files_share_the_budget() -> None:
    """64 shards of 8 MiB, each read a little at a time: resident memory stays near the budget."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_large, args=(theirs, 64, 8 * MIB))
    process.start()
    theirs.close()
    try:
        urls = ours.recv()
        limit = 64 * MIB
        storage = Storage(StorageConfig(read_ahead_bytes=limit))
        infos = storage.infos(urls)
        gc.collect()
        before = psutil.Process().memory_info().rss
        files = [storage.open(url, info) for url, info in zip(urls, infos, strict=True)]
        most_used = most_resident = 0
        for _ in range(20):
            for file in files:
                assert len(file.read(100_000)) == 100_000
                most_used = max(most_used, storage._resources().read_ahead.used_bytes)
            most_resident = max(most_resident, psutil.Process().memory_info().rss - before)
        assert most_used <= limit
        # Beside the budget, an eighth of the shards: 64 buffers of 256 KiB, the bytes received by
        # 32 connections, and slack of the allocator.
        assert most_resident < 2 * limit, f"{most_resident / MIB:.0f} MiB"
        storage.close()
    finally:
        ours.send("stop")
        process.join(20)
        process.close()
        ours.close()


def test_closing_a_file_cancels_what_is_on_its_way() -> None:
    with FaultServer({"a.tar": DATA}, (Fault("stall", after_bytes=5000),)) as server:
        storage = Storage()
        file = storage.open(server.url("a.tar"), KNOWN)
        assert file.read(100) == DATA[:100]
        assert file.read1(100)  # type: ignore[attr-defined]
        start = time.monotonic()
        file.close()
        storage.close()
        assert time.monotonic() - start < 2


def test_closing_a_storage_closes_its_files_and_it_can_be_used_again() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage()
        file = storage.open(server.url("a.tar"))
        file.read(10)
        storage.close()
        storage.close()
        assert file.closed
        with storage.open(server.url("a.tar")) as file:
            assert file.read(10) == DATA[:10]
        storage.close()


def test_a_storage_that_is_forgotten_closes_its_connections() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage()
        assert storage.open(server.url("a.tar")).read(10) == DATA[:10]
        del storage
        gc.collect()


def test_a_file_that_is_forgotten_is_closed() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage()
        file = storage.open(server.url("a.tar"))
        file.read(10)
        del file
        gc.collect()
        assert repr(storage) == "<Storage 0 remote files open | 0.0 MiB read ahead>"
        storage.close()


def test_the_garbage_collector_may_close_a_file_at_any_moment() -> None:
    """It runs whenever something is allocated: also where the lock of the read-ahead is held."""
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage()
        with storage.open(server.url("a.tar"), KNOWN) as file:
            forgotten = storage.open(server.url("a.tar"), KNOWN)
            forgotten.read(10)
            with storage._resources().read_ahead._locked():
                del forgotten
            assert "1 remote files open" in repr(storage)
            assert file.read() == DATA
        assert "0.0 MiB" in repr(storage)
        storage.close()


def test_an_interrupt_gets_through_while_a_read_waits() -> None:
    with FaultServer({"a.tar": DATA}, (Fault("stall"),)) as server:
        storage = Storage()
        with storage.open(server.url("a.tar"), KNOWN) as file:

            def interrupt() -> None:
                until(lambda: len(server.requests) > 0)
                os.kill(os.getpid(), signal.SIGINT)

            helper = threading.Thread(target=interrupt)
            helper.start()
            start = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                file.read(10)
            assert time.monotonic() - start < 5
            helper.join()
        storage.close()


def test_several_threads_read_through_one_storage() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage()
        right: list[bool] = []

        def read() -> None:
            with storage.open(server.url("a.tar")) as file:
                right.append(file.read() == DATA)

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert right == [True] * 6
        storage.close()


def read_in_child(storage: Storage, url: str, pipe: Connection) -> None:
    """Reads in another process and returns the result."""
    with storage.open(url) as file:
        data = file.read()
    pipe.send((data == DATA, storage.take_counts()["storage_bytes"]))
    storage.close()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_storage_in_use_works_in_a_child_process(method: str) -> None:
    context = multiprocessing.get_context(method)
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage(SOON)
        storage.info(server.url("a.tar"))  # connected before the child starts
        with storage.open(server.url("a.tar")) as file:
            assert file.read(10) == DATA[:10]
            ours, theirs = context.Pipe()
            child = context.Process(
                target=read_in_child, args=(storage, server.url("a.tar"), theirs)
            )
            child.start()
            theirs.close()
            assert ours.poll(30) and ours.recv() == (True, len(DATA))
            assert file.read() == DATA[10:], "the parent reads on"
            child.join(30)
            assert child.exitcode == 0
            child.close()
            ours.close()
        storage.close()
    stop_helpers()


def use_inherited_file(file: io.BufferedReader, pipe: Connection) -> None:
    """Uses objects that must not be used in a child."""
    sockets = [s for s in psutil.Process().net_connections() if s.status == "ESTABLISHED"]
    try:
        file.raw.read(10)
    except ValueError as error:
        pipe.send((str(error), len(sockets)))
    file.close()


def test_a_forked_child_inherits_no_connection_and_a_file_says_so() -> None:
    context = multiprocessing.get_context("fork")
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage(SOON)
        with storage.open(server.url("a.tar")) as file:
            assert file.read(300_000) == DATA[:300_000]
            ours, theirs = context.Pipe()
            # The server's ends of the connections are inherited, as it lives in this process.
            child = context.Process(target=use_inherited_file, args=(file, theirs))
            child.start()
            theirs.close()
            assert ours.poll(30)
            said, num_sockets = ours.recv()
            assert "before this process was forked" in said
            assert num_sockets == 0, "the parent closed them before it forked"
            child.join(10)
            child.close()
            ours.close()
            assert file.read() == DATA[300_000:]
        storage.close()


def test_a_storage_is_pickled_without_what_it_holds() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage(SOON)
        storage.info(server.url("a.tar"))
        copy = pickle.loads(pickle.dumps(storage))
        assert copy.config == SOON and copy.take_counts() == {}
        with copy.open(server.url("a.tar")) as file:
            assert file.read(10) == DATA[:10]
        copy.close()
        storage.close()


def cached(tmp_path: Path, *urls: str) -> dict[str, int]:
    """Reads addresses one by one through a cache; returns its counts."""
    storage = Storage(replace(SOON, cache_folder=str(tmp_path / "cache")))
    for url in urls:
        with storage.open(url) as file:
            assert file.read() == DATA
    counts = storage.take_counts()
    storage.close()
    return {name: count for name, count in counts.items() if name.startswith("cache_")}


def test_a_query_that_may_name_an_object_names_its_entry_in_the_cache(tmp_path: Path) -> None:
    with FaultServer({"get": DATA}) as server:  # one ETag for both, as is allowed
        url = server.url("get")
        assert cached(tmp_path, f"{url}?id=1", f"{url}?id=2") == {"cache_misses": 2}


@pytest.mark.parametrize("name", ["X-Amz-Signature", "X-Goog-Signature", "Signature", "sig"])
def test_an_address_that_is_signed_anew_names_the_same_entry(tmp_path: Path, name: str) -> None:
    with FaultServer({"a.tar": DATA}) as server:
        urls = [f"{server.url('a.tar')}?Expires=9&{name}={value}" for value in ("one", "two")]
        assert cached(tmp_path, *urls) == {"cache_misses": 1, "cache_hits": 1}


def test_what_has_no_version_is_not_cached_and_that_is_counted(tmp_path: Path) -> None:
    with FaultServer({"a.tar": DATA}, etags="none") as server:
        assert cached(tmp_path, server.url("a.tar")) == {"cache_bypasses": 1}


def test_globs_of_a_web_server_follow_its_links() -> None:
    files = {"data/b.tar": DATA, "data/a.tar": DATA, "data/x.txt": b"x", "other/c.tar": DATA}
    with FaultServer(files) as server:
        storage = Storage(SOON)
        assert storage.expand(server.url("data/*.tar")) == [
            server.url("data/a.tar"),
            server.url("data/b.tar"),
        ]
        with pytest.raises(ConfigError, match="matches nothing"):
            storage.expand(server.url("data/*.zip"))
        storage.close()


def test_a_listing_that_fails_is_tried_again_and_then_named() -> None:
    with FaultServer({"d/a.tar": DATA}, (Fault("status", status=503, first=1),)) as server:
        storage = Storage(SOON)
        assert storage.expand(server.url("d/*.tar")) == [server.url("d/a.tar")]
        assert storage.take_counts()["storage_retries"] == 1
        storage.close()
    with FaultServer({"d/a.tar": DATA}, (Fault("status", status=503),)) as server:
        storage = Storage(AT_ONCE)
        with pytest.raises(ShardUnavailableError, match="503"):
            storage.expand(server.url("d/*.tar"))
        storage.close()


def test_many_objects_are_asked_about_side_by_side() -> None:
    files = {f"{k:02}.tar": bytes(k) for k in range(60)}
    with FaultServer(files) as server:
        storage = Storage(SOON)
        infos = storage.infos([server.url(name) for name in files])
        assert [info.num_bytes for info in infos] == list(range(60))
        server.add(Fault("status", status=404, path="33.tar"))
        with pytest.raises(ShardUnavailableError, match="33.tar"):
            storage.infos([server.url(name) for name in files])
        storage.close()


def test_reads_work_from_a_process_whose_loop_others_use_too() -> None:
    """fsspec's loop is shared: a storage that closes leaves it running."""
    with FaultServer({"a.tar": DATA}) as server:
        first, second = Storage(SOON), Storage(SOON)
        with second.open(server.url("a.tar")) as file:
            assert file.read(10) == DATA[:10]
            with first.open(server.url("a.tar")) as other:
                other.read(10)
            first.close()
            assert get_loop().is_running()
            assert file.read() == DATA[10:]
        second.close()


def test_a_program_may_end_with_reads_on_their_way() -> None:
    """Neither an open file nor a stalled server keeps the interpreter from ending, quietly."""
    program = (
        "import sys; from jest_stream.storage import Storage\n"
        "from jest_stream.types import ObjectInfo\n"
        "storage = Storage()\n"
        f"file = storage.open(sys.argv[1], ObjectInfo({len(DATA)}))\n"
        "print(len(file.read(10)))"
    )
    with FaultServer({"a.tar": DATA}, (Fault("stall", after_bytes=400_000),)) as server:
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, server.url("a.tar")],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")
        assert time.monotonic() - start < 15


def connections() -> list[object]:
    return [s for s in psutil.Process().net_connections("tcp") if s.status == "ESTABLISHED"]


def test_a_closed_dataset_holds_no_connection_to_what_it_opened_itself(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, num_shards=2, examples_per_shard=16)
    with FaultServer({Path(path).name: Path(path).read_bytes() for path in shards}) as server:
        dataset = JESTDataset(
            [server.url(Path(path).name) for path in shards],
            selection=SelectionConfig(method="uniform"),
            transform=to_tensor,
            tokenizer=tokenize,
            batch_size=4,
        )
        next(iter(dataset))
        assert dataset.metrics()["storage_bytes"] > 0
        assert connections()
        dataset.close()
        until(lambda: not connections())
