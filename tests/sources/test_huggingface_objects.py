"""Objects of `datasets` are sources: split by shards or rows, undecoded, resumed exactly.

pytest tests/sources/test_huggingface_objects.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.distributed import split_dataset_by_node
from support.hub_server import HubServer, parquet_of, tar_of
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor, tokenize
from support.shards import draw, encode, make_example

from jest_stream import JESTDataset
from jest_stream.errors import BadExampleError, ConfigError
from jest_stream.sources import open_source
from jest_stream.sources.huggingface import HuggingFaceSource

pytestmark = pytest.mark.usefixtures("no_leaks")

NUM_ROWS = 60
FEATURES = datasets.Features(
    {"image": datasets.Image(), "caption": datasets.Value("string"), "n": datasets.Value("int64")}
)


def row(index: int) -> dict[str, Any]:
    image, caption = draw(index)
    data = {"bytes": encode(image, "png"), "path": None}
    return {"image": data, "caption": f"{caption} {index}", "n": index}


def generate(parts: list[int]) -> Iterator[dict[str, Any]]:
    for part in parts:
        for index in range(part * 15, (part + 1) * 15):
            yield row(index)


def table() -> Any:
    return datasets.Dataset.from_list([row(i) for i in range(NUM_ROWS)], features=FEATURES)


def generated() -> Any:
    return datasets.IterableDataset.from_generator(
        generate, gen_kwargs={"parts": [0, 1, 2, 3]}, features=FEATURES
    )


OBJECTS: dict[str, Callable[[], Any]] = {
    "table": table,
    "selected rows": lambda: table().shuffle(seed=3).select(range(50)),
    "generator": generated,
    "arrow shards": lambda: table().to_iterable_dataset(num_shards=4),
    "mapped": lambda: generated().map(lambda r: {**r, "n": r["n"] + 1}),
    "filtered": lambda: generated().filter(lambda r: r["n"] % 3 > 0),
    "taken": lambda: generated().skip(7).take(40),
    "formatted": lambda: generated().with_format("torch"),
}


def read(source: Any) -> list[Any]:
    return [step for shard in range(source.num_shards) for step in source.read(shard)]


@pytest.mark.parametrize("name", OBJECTS)
def test_every_row_is_read_once_and_in_order(name: str) -> None:
    dataset = OBJECTS[name]()
    expected = [r["caption"] for r in OBJECTS[name]().with_format(None)]
    examples = [example for example, _ in read(open_source(dataset))]
    assert [example["text"] for example in examples] == expected
    assert all(example["caption"] == example["text"] for example in examples)
    assert len({example["__key__"] for example in examples}) == len(expected)
    if name not in ("mapped", "filtered"):  # for user functions datasets decodes
        assert all(isinstance(example["image"], bytes) for example in examples)


@pytest.mark.parametrize("name", OBJECTS)
def test_reading_goes_on_after_any_example(name: str) -> None:
    source = open_source(OBJECTS[name]())
    for shard in (0, source.num_shards - 1):
        whole = list(source.read(shard))
        for index in range(len(whole) + 1):
            offset = whole[index - 1][1] if index else 0
            rest = list(source.read(shard, offset=offset, index=index))
            assert [(e["text"], o) for e, o in rest] == [(e["text"], o) for e, o in whole[index:]]


def jest(source: Any, **options: Any) -> JESTDataset:
    return JESTDataset(
        source,
        learner=TinyTwoTower(1),
        reference=TinyTwoTower(2),
        transform=to_tensor,
        tokenizer=tokenize,
        batch_size=4,
        filter_ratio=0.5,
        as_dict=True,
        **options,
    )


@pytest.mark.parametrize("name", ["table", "generator", "arrow shards"])
def test_resuming_and_workers_change_nothing(name: str) -> None:
    states, whole = [], []
    with jest(OBJECTS[name]()) as dataset:
        states.append(dataset.state_dict())
        for batch in islice(dataset, 10):  # an epoch has 7
            whole.append(list(batch["key"]))
            states.append(dataset.state_dict())
    for step in range(10):
        with jest(OBJECTS[name](), num_workers=2 if step in (2, 8) else 0) as dataset:
            dataset.load_state_dict(states[step])
            assert list(next(iter(dataset))["key"]) == whole[step]


def test_a_table_is_split_so_that_workers_can_share_it() -> None:
    source = HuggingFaceSource(table())
    assert source.num_shards == NUM_ROWS and list(source.num_examples or ()) == [1] * NUM_ROWS
    assert source.fingerprint == HuggingFaceSource(table()).fingerprint
    assert source.fingerprint != HuggingFaceSource(table().shuffle(seed=1)).fingerprint
    assert HuggingFaceSource(generated()).num_examples is None


def test_what_cannot_be_split_is_one_shard() -> None:
    assert open_source(generated()).num_shards == 4
    assert open_source(generated().skip(7).take(40)).num_shards == 1
    assert open_source(datasets.interleave_datasets([generated(), generated()])).num_shards == 1


def test_image_files_of_a_dataset_are_read_and_addresses_are_not(tmp_path: Path) -> None:
    file = tmp_path / "0.png"
    file.write_bytes(row(0)["image"]["bytes"])
    paths = [str(file), str(tmp_path / "none.png"), "http://127.0.0.1:9/x.png"]
    held = [{"image": {"bytes": None, "path": path}, "caption": "a", "n": 0} for path in paths]
    dataset = datasets.Dataset.from_list(held, features=FEATURES)
    good, missing, remote = (example for example, _ in read(HuggingFaceSource(dataset)))
    assert good["image"] == file.read_bytes()
    assert isinstance(missing, BadExampleError) and isinstance(remote, BadExampleError)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_names_of_columns_may_hold_dots(is_streamed: bool) -> None:
    dataset = datasets.Dataset.from_list([{"a.jpg": b"1", "b.caption": "x", "b": 5}])
    if is_streamed:
        dataset = dataset.to_iterable_dataset()
    ((example, _),) = read(HuggingFaceSource(dataset))
    assert (example["image"], example["text"], example["b"]) == (b"1", "x", 5)


@pytest.mark.parametrize("kind", ["table", "stream", "stream without features"])
def test_a_caption_within_a_struct_can_be_named(kind: str) -> None:
    rows = [{"jpg": b"1", "meta": {"caption": "x"}}]
    dataset: Any = datasets.Dataset.from_list(rows)
    if kind == "stream":
        dataset = dataset.to_iterable_dataset()
    elif kind == "stream without features":
        dataset = datasets.IterableDataset.from_generator(lambda: iter(rows))
    ((example, _),) = read(HuggingFaceSource(dataset, text_key="meta.caption"))
    assert (example["image"], example["text"]) == (b"1", "x")
    with pytest.raises(ConfigError, match=r"text_key='meta\.title' is no column"):
        HuggingFaceSource(dataset, text_key="meta.title")


def test_what_cannot_be_gone_back_to_is_refused() -> None:
    with pytest.raises(ConfigError, match="shuffled with .shuffle"):
        HuggingFaceSource(generated().shuffle(seed=0, buffer_size=10))
    with pytest.raises(ConfigError, match="shuffled with .shuffle"):
        HuggingFaceSource(generated().shuffle(seed=0, buffer_size=10).map(lambda r: r))
    split = split_dataset_by_node(generated(), rank=0, world_size=2)
    with pytest.raises(ConfigError, match="split by split_dataset_by_node"):
        HuggingFaceSource(split)
    with pytest.raises(ConfigError, match="a transform of its own"):
        HuggingFaceSource(table().with_transform(lambda batch: batch))
    with pytest.raises(ConfigError, match="has the splits train: pass one of them"):
        HuggingFaceSource(datasets.DatasetDict(train=table()))
    with pytest.raises(ConfigError, match="no column of images"):
        HuggingFaceSource(table().remove_columns("image"))
    with pytest.raises(ConfigError, match="has no rows"):
        HuggingFaceSource(table().select([]))


CLIENT = """
import json
import datasets
from jest_stream.sources import HuggingFaceSource, open_source

def pair(example):
    text, image = example.get("text", example.get("txt")), example.get("image", example.get("jpg"))
    return [text if isinstance(text, str) else text.decode(), image.hex()]

def read(source):
    return [pair(step[0]) for shard in range(source.num_shards) for step in source.read(shard)]

found = {}
for name in ("acme/tars", "acme/parquet"):
    theirs = open_source(datasets.load_dataset(name, split="train", streaming=True))
    ours = read(HuggingFaceSource(name))
    whole = [pair(example) for example, _ in theirs.read(1)]
    tail = [pair(example) for example, _ in theirs.read(1, index=3)]
    found[name] = [len(ours), ours == read(theirs), theirs.num_shards, tail == whole[3:]]
print(json.dumps(found))
"""


@pytest.mark.timeout(120)
def test_datasets_streaming_from_a_hub_gives_what_we_read(tmp_path: Path) -> None:
    parts = [[make_example(i) for i in range(k * 10, k * 10 + 10)] for k in range(3)]
    with HubServer() as hub:
        card = b"---\nlicense: mit\n---\n"
        tars = {f"data/train-{k:05d}.tar": tar_of(part) for k, part in enumerate(parts)}
        tables = {
            f"data/train-{k:05d}-of-00003.parquet": parquet_of(p) for k, p in enumerate(parts)
        }
        hub.put("acme/tars", {"README.md": card, **tars})
        hub.put("acme/parquet", {"README.md": card, **tables})
        done = subprocess.run(
            [sys.executable, "-c", CLIENT],
            env={**os.environ, **hub.environment(tmp_path)},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "acme/tars": [30, True, 3, True],
        "acme/parquet": [30, True, 3, True],
    }
