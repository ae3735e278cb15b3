"""Repositories of the Hub give the files that `datasets` would read, strictly, at one commit.

pytest tests/sources/test_huggingface.py
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import subprocess
import sys
import tarfile
import traceback
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub_server import Fault, HubServer, parquet_of, tar_of
from support.live_pickles import pickled
from support.models import TinyTwoTower, to_tensor, tokenize
from support.remote import nothing_survives  # noqa: F401
from support.shards import make_example

from jest_stream import JESTDataset
from jest_stream.config.storage import StorageConfig
from jest_stream.errors import (
    ConfigError,
    ShardError,
    ShardTruncatedError,
    ShardUnavailableError,
    UnsafeDataError,
)
from jest_stream.sources import open_source
from jest_stream.sources.hub import parse_repository
from jest_stream.sources.huggingface import HuggingFaceSource
from jest_stream.sources.parquet import ParquetFile, ParquetSource
from jest_stream.sources.tar import TarSource
from jest_stream.views.decode import decode

TARS, PARQUET = "acme/tars", "acme/parquet"
NUM_FILES, PER_FILE = 4, 24
OPENED: weakref.WeakSet[HuggingFaceSource] = weakref.WeakSet()
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


def examples(file: int) -> list[dict[str, Any]]:
    return [make_example(i) for i in range(file * PER_FILE, (file + 1) * PER_FILE)]


def tars() -> dict[str, bytes]:
    return {f"data/train-{k:05d}.tar": tar_of(examples(k)) for k in range(NUM_FILES)}


def tables() -> dict[str, bytes]:
    names = [f"data/train-{k:05d}-of-{NUM_FILES:05d}.parquet" for k in range(NUM_FILES)]
    return {name: parquet_of(examples(k)) for k, name in enumerate(names)}


@pytest.fixture(scope="module")
def files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    return tars(), tables()


@pytest.fixture
def hub(files: tuple[dict[str, bytes], dict[str, bytes]]) -> Iterator[HubServer]:
    with HubServer() as server:
        server.put(TARS, files[0])
        server.put(PARQUET, files[1])
        yield server
        for stream in list(OPENED):
            stream.close()
        gc.collect()  # an error that was caught holds what it went through


def storage(hub: HubServer, **settings: Any) -> StorageConfig:
    settings = {"retry_timeout_s": 10.0, "stall_timeout_s": 5.0, **settings}
    return StorageConfig(options={"hf": {"endpoint": hub.url}}, **settings)


def source(hub: HubServer, name: str, **options: Any) -> HuggingFaceSource:
    stream = HuggingFaceSource(name, storage=storage(hub), **options)
    OPENED.add(stream)
    return stream


def keys(stream: Any) -> list[str]:
    return [step[0]["__key__"] for shard in range(stream.num_shards) for step in stream.read(shard)]


def paths(stream: HuggingFaceSource) -> list[str]:
    shown = [stream.shard_name(shard) for shard in range(stream.num_shards)]
    return [name.partition(f"@{stream.commit}/")[2] for name in shown]


def test_tars_give_what_local_tars_give(
    hub: HubServer, files: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path
) -> None:
    for name, data in files[0].items():
        (tmp_path / Path(name).name).write_bytes(data)
    local = TarSource(str(tmp_path / "*.tar"))
    remote = source(hub, TARS)
    assert remote.num_shards == NUM_FILES
    for shard in range(NUM_FILES):
        ours, theirs = list(remote.read(shard)), list(local.read(shard))
        assert [after for _, after in ours] == [after for _, after in theirs]
        for (mine, _), (his, _) in zip(ours, theirs, strict=True):
            assert {**mine, "__shard__": ""} == {**his, "__shard__": ""}


def test_parquet_gives_what_local_parquet_gives(
    hub: HubServer, files: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path
) -> None:
    local = []
    for name, data in files[1].items():
        path = tmp_path / Path(name).name
        path.write_bytes(data)
        local.append(ParquetFile(str(path), None, name.rpartition(".")[0]))
    expected = ParquetSource(local)
    remote = source(hub, PARQUET)
    assert list(remote.num_examples or ()) == [PER_FILE] * NUM_FILES
    for shard in range(NUM_FILES):
        ours, theirs = list(remote.read(shard)), list(expected.read(shard))
        for (mine, _), (his, _) in zip(ours, theirs, strict=True):
            assert {**mine, "__shard__": ""} == {**his, "__shard__": ""}


@pytest.mark.parametrize("name", [TARS, PARQUET])
def test_reading_goes_on_at_any_example(hub: HubServer, name: str) -> None:
    stream = source(hub, name)
    whole = list(stream.read(1))
    for index in range(0, PER_FILE + 1, 5):
        offset = whole[index - 1][1] if index else 0
        assert list(stream.read(1, offset=offset, index=index)) == whole[index:]


def test_a_repository_is_a_source_by_its_address(hub: HubServer) -> None:
    for address in (f"hf://datasets/{TARS}", f"hf://datasets/{PARQUET}@main"):
        assert isinstance(open_source(address, storage=storage(hub)), HuggingFaceSource)
    files = open_source(f"hf://datasets/{TARS}/data/*.tar", storage=storage(hub))
    assert isinstance(files, TarSource) and files.num_shards == NUM_FILES
    assert keys(files) == keys(source(hub, TARS))


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://datasets/org/name", ("org/name", None)),
        ("hf://datasets/org/name/", ("org/name", None)),
        ("HF://datasets/org/name", ("org/name", None)),
        ("org/name@v1.0", ("org/name", "v1.0")),
        ("hf://datasets/org/name@refs/convert/parquet", ("org/name", "refs/convert/parquet")),
        ("hf://datasets/org/name/data/*.tar", None),
        ("hf://datasets/org/name@main/x.tar", None),
        ("hf://org/model", None),
        ("name", None),
    ],
)
def test_addresses_of_repositories_are_told_from_those_of_files(
    address: str, expected: tuple[str, str | None] | None
) -> None:
    assert parse_repository(address) == expected


def test_the_commit_is_pinned_while_the_branch_moves(hub: HubServer) -> None:
    stream = source(hub, TARS)
    before = keys(stream)
    hub.put(TARS, {"data/train-00000.tar": tar_of([make_example(999)])})
    assert keys(stream) == before
    moved = source(hub, TARS)
    assert keys(moved) == ["000999"] and moved.fingerprint != stream.fingerprint
    again = source(hub, TARS, revision=stream.commit)
    assert keys(again) == before and again.fingerprint == stream.fingerprint


def test_a_new_commit_with_the_same_data_is_the_same_source(
    hub: HubServer, files: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    stream = source(hub, PARQUET)
    hub.put(PARQUET, {**files[1], "README.md": b"# Now with a description\n"})
    again = source(hub, PARQUET)
    assert again.commit != stream.commit and again.fingerprint == stream.fingerprint


def test_listings_of_many_pages_are_read_to_their_end(
    files: tuple[dict[str, bytes], dict[str, bytes]],
) -> None:
    with HubServer(page_size=2) as hub:
        hub.put(TARS, files[0])
        assert source(hub, TARS).num_shards == NUM_FILES


SPLITS = b"""---
configs:
- config_name: small
  data_files:
  - split: train
    path: "first/*.tar"
  - split: held_out
    path: ["second/a.tar", "second/b.tar"]
- config_name: large
  default: true
  data_dir: third
---
# Card
"""


def test_the_readme_says_which_files_make_a_split(hub: HubServer) -> None:
    tar = tar_of(examples(0))
    inside = ["first/1.tar", "first/2.tar", "second/a.tar", "second/b.tar", "second/c.tar"]
    files = {name: tar for name in [*inside, "third/train.tar", "third/test.tar", "third/.x.tar"]}
    hub.put("acme/splits", {**files, "README.md": SPLITS})
    assert paths(source(hub, "acme/splits", config="small")) == ["first/1.tar", "first/2.tar"]
    held_out = source(hub, "acme/splits", config="small", split="held_out")
    assert paths(held_out) == ["second/a.tar", "second/b.tar"]
    assert paths(source(hub, "acme/splits")) == ["third/train.tar"]
    with pytest.raises(ConfigError, match="no configuration 'huge': 'small', 'large'"):
        source(hub, "acme/splits", config="huge")
    with pytest.raises(ConfigError, match="no split 'dev'; it has 'train', 'test'"):
        source(hub, "acme/splits", split="dev")


def test_a_readme_cannot_lead_out_of_the_repository(hub: HubServer) -> None:
    for path in ("https://example.com/x.tar", "../other/x.tar", "zip://x.tar::y.zip", "/etc/x.tar"):
        card = f"---\nconfigs:\n- config_name: default\n  data_files: {path!r}\n---\n"
        hub.put("acme/leads", {"README.md": card.encode(), "x.tar": b""})
        with pytest.raises(ConfigError, match="data outside of the repository"):
            source(hub, "acme/leads")


def test_columns_can_be_named_for_tables_only(hub: HubServer) -> None:
    stream = source(hub, PARQUET, image_key="image", text_key="text")
    assert len(keys(stream)) == NUM_FILES * PER_FILE
    with pytest.raises(ConfigError, match="text_key='caption' is no column.*image.*text.*index"):
        source(hub, PARQUET, text_key="caption")
    with pytest.raises(ConfigError, match="this repository holds tars"):
        source(hub, TARS, text_key="caption")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"name.py": b"raise SystemExit", "a.parquet": b""}, "a script of its own .name.py"),
        ({"train.csv": b"a,b", "test.csv": b"a,b"}, "consists of 1 .csv; read are .tar and .parq"),
        ({"README.md": b"# empty"}, "has no split 'train'; it has none"),
        ({"train[1].tar": b""}, "has a name that means a pattern"),
        ({"data/a-b-00000-of-00001.tar": b""}, "org/name give no splits: Split name should match"),
    ],
)
def test_repositories_that_cannot_be_read_say_why(
    hub: HubServer, held: dict[str, bytes], message: str
) -> None:
    hub.put("org/name", held)
    with pytest.raises(ConfigError, match=message):
        source(hub, "org/name")


def test_what_is_missing_is_named(hub: HubServer) -> None:
    with pytest.raises(ConfigError, match="hf://datasets/acme/none does not exist, or is private"):
        source(hub, "acme/none")
    with pytest.raises(ConfigError, match="has no revision 'v9'"):
        source(hub, f"{TARS}@v9")
    with pytest.raises(ConfigError, match="contradicts the address"):
        source(hub, f"{TARS}@main", revision="v1")
    with pytest.raises(ConfigError, match="is no repository of datasets"):
        source(hub, f"hf://datasets/{TARS}/data/x.tar")
    with pytest.raises(ConfigError, match="takes 'hf://datasets/org/name'.*got a int"):
        HuggingFaceSource(3)


def test_no_server_is_an_error_after_a_limited_time() -> None:
    with HubServer() as hub:
        settings = storage(hub, retry_timeout_s=1.0, connect_timeout_s=1.0)
    with pytest.raises(ShardUnavailableError, match="hf://datasets/acme/tars.*gave up after"):
        HuggingFaceSource(TARS, storage=settings)


def shown(error: BaseException) -> str:
    """Everything of an error that could reach a log."""
    return "".join(traceback.format_exception(error)) + repr(error.args) + repr(vars(error))


@pytest.mark.parametrize("is_gated", [True, False])
def test_a_token_opens_what_is_closed_and_is_shown_nowhere(
    hub: HubServer,
    files: tuple[dict[str, bytes], dict[str, bytes]],
    is_gated: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.put(PARQUET, files[1], token=TOKEN, is_gated=is_gated)
    for token, status in ((None, 401), ("hf_wrongwrongwrong", 403 if is_gated else 401)):
        with pytest.raises((ConfigError, ShardUnavailableError), match=f"{status}") as caught:
            source(hub, PARQUET, token=token)
        assert "HF_TOKEN" in str(caught.value)
        assert "hf_wrong" not in shown(caught.value)
    stream = source(hub, PARQUET, token=TOKEN)
    assert len(keys(stream)) == NUM_FILES * PER_FILE
    assert len(keys(pickle.loads(pickle.dumps(stream)))) == NUM_FILES * PER_FILE
    assert TOKEN not in f"{stream!r} {stream.fingerprint} {stream.shard_name(0)} {vars(stream)}"
    assert TOKEN not in caplog.text
    content = [request for request in hub.requests if request.path.startswith("/content/")]
    assert content and not any(request.token for request in content)


def test_a_gated_repository_says_where_to_ask_and_opens_with_the_token_of_the_environment(
    hub: HubServer,
    files: tuple[dict[str, bytes], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = {**files[1], "README.md": b"---\nlicense: mit\n---\n"}
    hub.put("acme/gated", content, token=TOKEN, is_gated=True)
    with pytest.raises(ConfigError, match="is gated.*Ask for access on http.*/datasets/acme/gated"):
        source(hub, "acme/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(keys(source(hub, "acme/gated"))) == NUM_FILES * PER_FILE


FIRST_USE = """
from jest_stream import HuggingFaceSource
source = HuggingFaceSource({name!r}, token={token!r})
print(sum(1 for shard in range(source.num_shards) for _ in source.read(shard)))
"""


@pytest.mark.parametrize("name", [TARS, PARQUET])
def test_a_token_is_all_that_a_fresh_process_needs(
    hub: HubServer,
    files: tuple[dict[str, bytes], dict[str, bytes]],
    tmp_path: Path,
    name: str,
) -> None:
    hub.put(name, dict(files[name == PARQUET]), token=TOKEN)
    ran = subprocess.run(
        [sys.executable, "-c", FIRST_USE.format(name=name, token=TOKEN)],
        env={**os.environ, **hub.environment(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == NUM_FILES * PER_FILE


FAULTS = {
    "busy": [Fault("resolve|content", status=503, times=2)],
    "too many requests": [Fault("resolve|tree", status=429, retry_after="1", times=2)],
    "server error": [Fault("api/datasets", status=500), Fault("content", status=500)],
    "ends early": [Fault("content", cut=10_000, times=2)],
    "reset": [Fault("content", cut=10_000, is_reset=True, times=2)],
}


@pytest.mark.parametrize("name", [TARS, PARQUET])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_change_nothing(hub: HubServer, name: str, fault: str) -> None:
    expected = keys(source(hub, name))
    hub.fail(*(Fault(**vars(one)) for one in FAULTS[fault]))
    stream = source(hub, name)
    assert keys(stream) == expected
    assert hub.take_fault("GET", "api/datasets/content/resolve/tree") is None, "it never struck"


@pytest.mark.parametrize("name", [TARS, PARQUET])
def test_a_signed_address_that_expired_is_asked_for_again(hub: HubServer, name: str) -> None:
    stream = source(hub, name)
    hub.fail(Fault("content.*train-00000", status=403))
    assert len(keys(stream)) == NUM_FILES * PER_FILE
    assert hub.take_fault("GET", "content/train-00000") is None


@pytest.mark.parametrize("name", [TARS, PARQUET])
def test_a_file_that_is_gone_is_named(hub: HubServer, name: str) -> None:
    stream = source(hub, name)
    hub.fail(Fault("(resolve|content).*train-00002", status=404, times=100))
    with pytest.raises(ShardUnavailableError, match="train-00002") as caught:
        keys(stream)
    assert caught.value.attempts < 5


@pytest.mark.parametrize("name", [TARS, PARQUET])
def test_a_file_that_the_server_cuts_is_never_a_shorter_one(hub: HubServer, name: str) -> None:
    stream = source(hub, name)
    hub.fail(Fault("content.*train-00002", short=40_000 if name == TARS else 10_000, times=100))
    with pytest.raises(ShardError, match="train-00002"):
        keys(stream)


def test_a_tar_that_was_cut_between_members_is_an_error(hub: HubServer) -> None:
    """Its first half is a prefix of whole members: `datasets` takes it for a shorter shard."""
    whole = tar_of(examples(0))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        middle = archive.getmembers()[PER_FILE * 3 // 2].offset
    hub.put("acme/cut", {"train-0.tar": whole[:middle]})
    read = source(hub, "acme/cut").read(0)
    with pytest.raises(ShardTruncatedError, match="train-0.tar.* without its end-of-archive"):
        list(read)


def test_a_parquet_file_that_was_cut_is_an_error(hub: HubServer) -> None:
    whole = parquet_of(examples(0))
    hub.put("acme/cut", {"train-0.parquet": whole, "train-1.parquet": whole[: len(whole) // 2]})
    read = source(hub, "acme/cut").read(1)
    with pytest.raises(ShardTruncatedError, match=r"train-1\.parquet.* was cut off"):
        list(read)


@pytest.mark.parametrize("member", ["pyd", "pkl", "pickle", "pth"])
def test_pickles_in_a_repository_are_never_opened(
    hub: HubServer, tmp_path: Path, member: str
) -> None:
    hatched = tmp_path / "hatched"
    example = {**make_example(0), member: pickled(hatched, member)}
    hub.put("acme/canary", {"train-0.tar": tar_of([example] * 1)})
    read, _ = next(source(hub, "acme/canary").read(0))
    assert isinstance(read, dict)
    with pytest.raises(UnsafeDataError, match="never is"):
        decode(read, member)
    assert not hatched.exists()


def jest(stream: Any, **options: Any) -> JESTDataset:
    return JESTDataset(
        stream,
        learner=TinyTwoTower(1),
        reference=TinyTwoTower(2),
        transform=to_tensor,
        tokenizer=tokenize,
        batch_size=4,
        as_dict=True,
        **{"filter_ratio": 0.5, **options},
    )


def steps(dataset: JESTDataset, number: int) -> list[tuple[list[str], torch.Tensor]]:
    return [(list(batch["key"]), batch["image"]) for batch in islice(dataset, number)]


def assert_same(
    ours: list[tuple[list[str], torch.Tensor]], theirs: list[tuple[list[str], torch.Tensor]]
) -> None:
    assert [keys for keys, _ in ours] == [keys for keys, _ in theirs]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", [TARS, PARQUET])
def test_workers_read_the_same_stream(hub: HubServer, name: str) -> None:
    with jest(source(hub, name)) as alone, jest(source(hub, name), num_workers=2) as together:
        assert_same(steps(together, 12), steps(alone, 12))


@pytest.mark.parametrize("name", [TARS, PARQUET])
def test_resuming_at_every_step_equals_the_uninterrupted_run(hub: HubServer, name: str) -> None:
    stream = source(hub, name)
    with jest(stream) as dataset:
        states, whole = [dataset.state_dict()], []
        for batch in islice(dataset, 14):  # an epoch has 12
            whole.append((list(batch["key"]), batch["image"]))
            states.append(dataset.state_dict())
    for step, state in enumerate(states[:-1]):
        again = source(hub, name) if step % 5 == 0 else stream
        with jest(again) as dataset:
            dataset.load_state_dict(state)
            assert_same(steps(dataset, 1), whole[step : step + 1])


def test_a_pass_over_parquet_takes_every_example_once(hub: HubServer) -> None:
    with jest(source(hub, PARQUET), repeat=False, filter_ratio=0.0) as dataset:
        read = [key for batch in dataset for key in batch["key"]]
    assert sorted(read) == sorted(keys(source(hub, PARQUET)))


def test_null_captions_are_bad_examples(hub: HubServer) -> None:
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(io.BytesIO(parquet_of(examples(0))))
    texts = [None if i % 6 == 5 else text for i, text in enumerate(table["text"].to_pylist())]
    table = table.set_column(1, "text", pyarrow.array(texts, pyarrow.string()))
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    hub.put("acme/nulls", {"train-0.parquet": buffer.getvalue()})
    with jest(source(hub, "acme/nulls"), repeat=False, on_bad_example="skip") as dataset:
        assert not any(key.endswith("/5") for batch in dataset for key in batch["key"])
        assert sum(v for k, v in dataset.metrics().items() if "missing_text" in k) == 4
    with (
        jest(source(hub, "acme/nulls"), repeat=False) as dataset,
        pytest.raises(Exception, match="no member for text_key"),
    ):
        list(dataset)
