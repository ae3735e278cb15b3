"""A reader gets the right bytes, or an error that names the fault of the server.

pytest tests/storage/test_remote_faults.py
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from email.utils import formatdate

import pytest
from support.fault_server import FaultServer
from support.faults import Fault
from support.remote import AT_ONCE, SOON, noise, nothing_survives, until  # noqa: F401

from jest_stream.config.storage import StorageConfig
from jest_stream.errors import ShardChangedError, ShardError, ShardUnavailableError
from jest_stream.sources.tar import TarSource
from jest_stream.storage.storage import Storage
from jest_stream.types import ObjectInfo

DATA = noise(3_000_000)


def read_all(server: FaultServer, config: StorageConfig = SOON) -> tuple[bytes, dict[str, int]]:
    """Reads the whole object; returns it and the counts, with everything closed."""
    storage = Storage(config)
    try:
        with storage.open(server.url("a.tar"), known(server)) as file:
            data = file.read()
        return data, storage.take_counts()
    finally:
        storage.close()


def known(server: FaultServer) -> ObjectInfo:
    """Length and version of the object, given beforehand: the first request is for data."""
    found = server.contents.get("a.tar")
    assert found is not None
    etag = {"strong": f'"{found[1]}"', "weak": f'W/"{found[1]}"', "none": ""}[server.etags]
    return ObjectInfo(len(found[0]), etag)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("refuse", first=3),
        Fault("reset", first=2, after_bytes=100_000),
        Fault("reset", first=2),
        Fault("stall", first=1, after_bytes=50_000),
        Fault("stall", first=1),
        Fault("truncate", first=2, after_bytes=70_000),
        Fault("lie", first=2, after_bytes=70_000),
        Fault("wrong", first=2),
        Fault("status", first=2, status=500),
        Fault("status", first=2, status=502),
        Fault("status", first=2, status=503),
        Fault("status", first=2, status=504),
        Fault("status", first=2, status=429),
        Fault("status", first=2, status=408),
        Fault("trickle", first=1, piece_bytes=50_000),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}-{fault.after_bytes}",
)
def test_a_passing_fault_is_survived_and_counted(fault: Fault) -> None:
    with FaultServer({"a.tar": DATA}, (fault,)) as server:
        data, counts = read_all(server)
        met = [request.fault for request in server.requests].count(fault.kind)
    assert data == DATA
    assert counts["storage_bytes"] == len(DATA), "nothing that arrived was read again"
    assert met == fault.first
    if fault.kind != "trickle":
        assert counts["storage_retries"] == met
        assert counts["storage_requests"] == len(server.requests)


def test_a_broken_read_goes_on_at_the_byte_where_it_broke_off() -> None:
    data = DATA[:900_000]  # one block
    with FaultServer({"a.tar": data}, (Fault("reset", first=3, after_bytes=200_000),)) as server:
        found, _ = read_all(server)
        requests = server.requests
    assert found == data
    starts = [request.start for request in requests]
    assert starts == sorted(set(starts)) and len(starts) == 4  # each attempt starts further on
    assert {request.end for request in requests} == {len(data)}
    assert len({request.headers["if-match"] for request in requests}) == 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("refuse"), "Connection reset|disconnected"),
        (Fault("reset"), "not completed|reset"),
        (Fault("stall"), "no byte within 0.3 s"),
        (Fault("truncate"), "not completed|ended after"),
        (Fault("lie"), "announced bytes 0-1048575, but a body of 0 bytes"),
        (Fault("wrong"), "27 bytes of text/html, which is not the shard"),
        (Fault("status", status=500), "HTTP status 500"),
        (Fault("status", status=503), "HTTP status 503"),
        (Fault("status", status=429), "HTTP status 429"),
    ],
    ids=lambda value: f"{value.kind}-{value.status}" if isinstance(value, Fault) else "",
)
def test_a_lasting_fault_ends_in_time_with_an_error_that_names_it(fault: Fault, said: str) -> None:
    start = time.monotonic()
    with (
        FaultServer({"a.tar": DATA}, (fault,)) as server,
        pytest.raises(ShardUnavailableError, match=said) as raised,
    ):
        read_all(server, AT_ONCE)
    assert time.monotonic() - start < 4
    error = raised.value
    assert error.attempts >= 2 and f"{error.attempts} attempts" in str(error)
    assert error.shard == server.url("a.tar") and error.shard in str(error)
    assert "retry_timeout_s=0.5" in str(error)


@pytest.mark.parametrize(
    ("status", "hint"), [(403, "options"), (404, "options"), (401, "headers"), (410, "410")]
)
def test_what_is_forbidden_or_missing_is_not_tried_again(status: int, hint: str) -> None:
    fault = Fault("status", status=status, retry_after="1")
    with (
        FaultServer({"a.tar": DATA}, (fault,)) as server,
        pytest.raises(ShardUnavailableError, match=f"HTTP status {status}") as raised,
    ):
        read_all(server)
    assert raised.value.attempts == 1 and "1 attempt;" in str(raised.value)
    assert hint in str(raised.value)
    with (
        FaultServer({"a.tar": DATA}, (fault,)) as server,
        pytest.raises(ShardUnavailableError, match=f"HTTP status {status}"),
    ):
        Storage(SOON).info(server.url("a.tar"))
    assert len(server.requests) == 1


def test_a_connection_that_is_refused_is_tried_again_until_the_server_is_back() -> None:
    with FaultServer({"a.tar": DATA}) as server:
        storage = Storage(SOON)
        with storage.open(server.url("a.tar"), known(server)) as file:
            found: list[bytes] = []
            reader = threading.Thread(target=lambda: found.append(file.read()))
            with server.down():
                reader.start()
                until(lambda: storage.take_counts().get("storage_retries", 0) > 0)
            reader.join(10)
        storage.close()
    assert found == [DATA]


def test_a_server_that_is_not_there_is_named_with_the_attempts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.tar"
        storage = Storage(AT_ONCE)
        with pytest.raises(ShardUnavailableError, match="Connect call failed|refused") as raised:
            storage.info(url)
        storage.close()
    assert raised.value.attempts >= 2


def test_a_name_that_cannot_be_looked_up_is_tried_again_and_then_named() -> None:
    storage = Storage(AT_ONCE)
    with pytest.raises(ShardUnavailableError, match="no-such-host.invalid") as raised:
        storage.info("http://no-such-host.invalid/a.tar")
    storage.close()
    assert raised.value.attempts >= 2


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(as_date: bool) -> None:
    # A date has whole seconds: asking for two means waiting more than one.
    retry_after = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    fault = Fault("status", first=1, status=429, retry_after=retry_after)
    start = time.monotonic()
    with FaultServer({"a.tar": DATA}, (fault,)) as server:
        data, counts = read_all(server)
    assert data == DATA and counts["storage_retries"] == 1
    assert 0.9 < time.monotonic() - start < 3


def test_a_server_that_asks_for_more_patience_than_there_is_ends_the_read_at_once() -> None:
    fault = Fault("status", status=503, retry_after="300")
    start = time.monotonic()
    with (
        FaultServer({"a.tar": DATA}, (fault,)) as server,
        pytest.raises(ShardUnavailableError, match="asks to wait 300 s") as raised,
    ):
        read_all(server)
    assert raised.value.attempts == 1 and time.monotonic() - start < 1


def test_pauses_double_and_differ_between_readers() -> None:
    fault = Fault("status", status=503)
    pauses = []
    for _ in range(2):
        arrivals: list[float] = []
        with FaultServer({"a.tar": DATA}, (fault,)) as server:
            note = server.note
            server.note = lambda *a, n=note, s=arrivals: (s.append(time.monotonic()), n(*a))[1]  # type: ignore[method-assign]
            with pytest.raises(ShardUnavailableError):
                Storage(StorageConfig(retry_timeout_s=1.5)).info(server.url("a.tar"))
        pauses.append([b - a for a, b in zip(arrivals, arrivals[1:], strict=False)])
    for waited in pauses:
        for k, pause in enumerate(waited):
            assert 0.5 * 0.2 * 2**k <= pause <= 0.2 * 2**k + 0.3
    # Equal to the millisecond: with probability 1e-5.
    assert [round(pause, 3) for pause in pauses[0]] != [round(pause, 3) for pause in pauses[1]]


@pytest.mark.parametrize("etags", ["strong", "weak"])
def test_an_object_that_changes_between_two_requests_is_an_error(etags: str) -> None:
    with FaultServer({"a.tar": DATA}, etags=etags) as server:  # type: ignore[arg-type]
        storage = Storage(SOON)
        expected = storage.info(server.url("a.tar"))
        server.replace("a.tar", noise(len(DATA), seed=1))
        with (
            storage.open(server.url("a.tar"), expected) as file,
            pytest.raises(ShardChangedError, match="changed while it was read"),
        ):
            file.read()
        storage.close()


def test_without_etags_another_length_is_noticed() -> None:
    with FaultServer({"a.tar": DATA}, etags="none") as server:
        storage = Storage(SOON)
        expected = storage.info(server.url("a.tar"))
        assert expected == ObjectInfo(len(DATA), "")
        server.replace("a.tar", DATA + b"more")
        with (
            storage.open(server.url("a.tar"), expected) as file,
            pytest.raises(ShardChangedError, match="3,000,004 bytes now, it had 3,000,000"),
        ):
            file.read()
        server.replace("a.tar", DATA[:10])
        with (
            storage.open(server.url("a.tar"), expected) as file,
            pytest.raises(ShardChangedError),
        ):
            file.seek(1_000_000)
            file.read()
        storage.close()


def test_an_object_that_changes_while_it_is_resumed_is_never_mixed() -> None:
    data = DATA[:900_000]  # one block, which breaks off and is asked for again
    faults = Fault("reset", nth=1, after_bytes=300_000), Fault("new_etag", nth=2)
    with FaultServer({"a.tar": data}, faults) as server:
        storage = Storage(SOON)
        with (
            storage.open(server.url("a.tar"), known(server)) as file,
            pytest.raises(ShardChangedError) as raised,
        ):
            while file.read1():  # type: ignore[attr-defined]
                pass
        storage.close()
    assert raised.value.offset == 300_000


def test_a_server_without_ranges_is_refused_with_the_reason() -> None:
    with FaultServer({"a.tar": DATA}, (Fault("ignore_range"),)) as server:
        with pytest.raises(ShardUnavailableError, match="ignores range requests") as raised:
            read_all(server)
        assert raised.value.attempts == 1
        assert "nginx" in str(raised.value)


def test_a_small_object_may_come_whole() -> None:
    with FaultServer({"a.tar": DATA[:5000]}, (Fault("ignore_range"),)) as server:
        data, counts = read_all(server)
    assert data == DATA[:5000] and "storage_retries" not in counts


def test_a_transfer_that_drips_is_given_up_in_time() -> None:
    config = StorageConfig(stall_timeout_s=1, retry_timeout_s=0.5)
    start = time.monotonic()
    with (
        FaultServer({"a.tar": DATA}, (Fault("trickle", piece_bytes=10, pause_s=0.02),)) as server,
        pytest.raises(ShardUnavailableError, match="too slow"),
    ):
        read_all(server, config)
    assert time.monotonic() - start < 4


def test_after_an_error_the_next_read_tries_again() -> None:
    with FaultServer({"a.tar": DATA}, (Fault("status", status=404, first=1),)) as server:
        storage = Storage(SOON)
        with storage.open(server.url("a.tar"), known(server)) as file:
            with pytest.raises(ShardUnavailableError):
                file.read(10)
            assert file.tell() == 0
            assert file.read() == DATA
        storage.close()


def test_what_fails_ahead_of_the_reader_concerns_it_only_when_it_gets_there() -> None:
    with FaultServer({"a.tar": DATA}, (Fault("status", status=404, nth=2),)) as server:
        storage = Storage(SOON)
        with storage.open(server.url("a.tar"), known(server)) as file:
            assert file.read(10) == DATA[:10]
            until(lambda: len(server.requests) > 1)  # the next block was asked for
            until(lambda: "| 1.0 MiB" in repr(storage))  # the failed block has been forgotten
            assert server.requests[1].fault == "status"
            assert file.read() == DATA[10:]
        storage.close()


def test_redirects_are_followed_and_checked() -> None:
    with FaultServer({"a.tar": DATA}) as target:
        fault = Fault("redirect", location=target.url("a.tar"))
        with FaultServer({"a.tar": DATA}, (fault,)) as server:
            data, _ = read_all(server)
        assert data == DATA and len(target.requests) >= 2


@pytest.mark.parametrize("login", ["me:PASSWORD@", ""])
def test_no_secret_is_shown_whatever_fails(login: str, caplog: pytest.LogCaptureFixture) -> None:
    secrets = ("SIGNATURE", "PASSWORD", "TOKEN")
    headers = {} if login else {"Authorization": "Bearer TOKEN-123456789"}
    options = {"http": {"headers": headers}}
    config = StorageConfig(retry_timeout_s=0.5, stall_timeout_s=0.3, options=options)
    caplog.set_level(logging.DEBUG, logger="jest_stream")
    shown = [repr(config), repr(Storage(config))]
    for fault in (
        Fault("status", status=403, body=b"SIGNATURE mismatch"),
        Fault("status", status=503),
        Fault("refuse"),
        Fault("reset"),
        Fault("ignore_range"),
        Fault("new_etag"),
        Fault("redirect", location="http://127.0.0.1:1/?token=TOKEN"),
    ):
        with FaultServer({"a.tar": DATA}, (fault,)) as server:
            url = server.url("a.tar").replace("//", f"//{login}") + "?X-Sig=SIGNATURE"
            storage = Storage(config)
            with (
                storage.open(url, known(server)) as file,
                pytest.raises(ShardError) as raised,
            ):
                shown.append(repr(file))
                file.read()
            storage.close()
        error: BaseException | None = raised.value
        while error is not None:  # a traceback shows causes and contexts, too
            shown += [str(error), repr(error), str(vars(error))]
            error = error.__cause__ or error.__context__
    shown.append(caplog.text)
    assert not [text for text in shown for secret in secrets if secret in text]
    assert "attempt 1 failed" in caplog.text


def test_a_shard_read_through_faults_gives_the_same_examples(tmp_path: object) -> None:
    from support.shards import make_example, members, write_tar

    examples = [make_example(index) for index in range(40)]
    path = write_tar(tmp_path / "a.tar", members(examples))  # type: ignore[operator]
    expected = [(e["__key__"], o) for e, o in TarSource(path).read(0)]  # type: ignore[index]
    faults = tuple(
        Fault(kind, nth=2 * k + 2, after_bytes=3000)  # type: ignore[arg-type]
        for k, kind in enumerate(("reset", "stall", "truncate", "lie", "wrong"))
    )
    with FaultServer(tmp_path, faults) as server:  # type: ignore[arg-type]
        source = TarSource(server.url("a.tar"), storage=SOON)
        for start in (0, 7, 20, 33):
            offset = expected[start - 1][1] if start else 0
            found = [(e["__key__"], o) for e, o in source.read(0, offset=offset)]  # type: ignore[index]
            assert found == expected[start:]
        assert {request.fault for request in server.requests} >= {"reset", "truncate"}
        source._storage.close()
