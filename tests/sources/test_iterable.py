"""`IterableSource` takes what people have; `open_source` takes what they write, or says why not."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from support.leaks import no_leaks  # noqa: F401
from support.models import tiny_dataset
from support.shards import draw, make_example, write_shards
from torch.utils.data import DataLoader, Dataset, IterableDataset

from jest_stream.errors import ConfigError, ShardUnavailableError, UnsafeDataError
from jest_stream.sources import open_source
from jest_stream.sources.iterable import IterableSource
from jest_stream.sources.lanes import Lane
from jest_stream.sources.tar import TarSource
from jest_stream.types import Cursor, Example, Source

pytestmark = pytest.mark.usefixtures("no_leaks")


class Squares(Dataset[Any]):
    """A map-style dataset that never raises IndexError."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": index, "text": f"{index**2}"}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(0, "zero"), (1, "one")])


def read(source: Any, index: int = 0) -> list[Any]:
    return [example for example, _ in open_source(source).read(0, index=index)]


def test_pairs_and_dicts_become_examples() -> None:
    image, caption = draw(0)
    assert read([(image, caption)]) == [{"__key__": "0", "image": image, "text": caption}]
    assert read([[image, caption]]) == read([(image, caption)])
    assert read([{"jpg": b"x"}, {"jpg": b"y", "__key__": 17}]) == [
        {"__key__": "0", "jpg": b"x"},
        {"__key__": "17", "jpg": b"y"},
    ]


def test_the_users_dicts_are_not_changed() -> None:
    given = {"jpg": b"x"}
    assert read([given])[0] is not given
    assert given == {"jpg": b"x"}


@pytest.mark.parametrize(
    ("dataset", "texts"), [(Squares(), ["0", "1", "4", "9"]), (Stream(), ["zero", "one"])]
)
def test_torch_datasets_are_one_shard(dataset: Any, texts: list[str]) -> None:
    source = open_source(dataset)
    assert (source.num_shards, source.shard_name(0)) == (1, f"<{type(dataset).__name__}>")
    assert [example["text"] for example, _ in source.read(0)] == texts


def test_a_webdataset_pipeline_is_an_iterable_of_examples(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, num_shards=1, examples_per_shard=3)

    def samples() -> Iterator[Any]:  # webdataset does not close the files that it opens itself
        with open(paths[0], "rb") as stream:
            yield from webdataset.tariterators.tar_file_expander([{"url": "", "stream": stream}])

    pipeline = webdataset.DataPipeline(samples, webdataset.tariterators.group_by_keys)
    keys = [example["__key__"] for example in read(pipeline)]
    assert keys == [f"{index:06d}" for index in range(3)]


class OnlyForward:
    """Iterates anew each time, and counts how far."""

    def __init__(self) -> None:
        self.num_read = 0

    def __iter__(self) -> Iterator[Any]:
        for index in range(5):
            self.num_read += 1
            yield {"text": str(index)}


@pytest.mark.parametrize("make", [Squares, OnlyForward, lambda: [{"text": "x"}] * 6])
def test_resuming_at_every_index_gives_the_tail(make: Any) -> None:
    whole = read(make())
    for index in range(len(whole) + 1):
        assert read(make(), index=index) == whole[index:]


class Recorded(list[Any]):
    """A list that knows which positions were read."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__(values)
        self.positions: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.positions.append(index)
        return super().__getitem__(index)


def test_sequences_resume_without_reading_what_came_before() -> None:
    values = Recorded([{"text": "x"}] * 5)
    assert len(list(IterableSource(values).read(0, index=3))) == 2
    assert values.positions == [3, 4]


def test_an_iterator_gives_one_pass_and_says_so_when_asked_for_another() -> None:
    source = IterableSource(iter([{"text": "a"}, {"text": "b"}]))
    settings = {"lane": 0, "num_lanes": 1, "seed": 0, "cursor": Cursor(0, 0, 0, 0)}
    one_pass = Lane(source, **settings, end_epoch=1)
    assert len(list(one_pass)) == 2
    with pytest.raises(ConfigError, match=r"2 are gone already; example 0 .* repeat=False"):
        next(Lane(source, **settings))


def test_an_iterator_that_was_paused_goes_on() -> None:
    lane = Lane(
        IterableSource({"text": str(i)} for i in range(4)),
        lane=0,
        num_lanes=1,
        seed=0,
        cursor=Cursor(0, 0, 0, 0),
        end_epoch=1,
    )
    first = next(lane)[0]
    lane.close()
    rest = [example for example, _ in lane]
    assert [example["text"] for example in [first, *rest]] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("item", [7, "text", (1, 2, 3), (1,), None, torch.zeros(2)])
def test_items_that_are_no_examples_are_refused(item: Any) -> None:
    with pytest.raises(ConfigError, match="position 1, but an example is a dict"):
        read(iter([{"text": ""}, item]))


def test_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="looks like batches"):
        read([(torch.zeros(2, 3, 8, 8), ["a", "b"])])
    with pytest.raises(ConfigError, match="Pass its dataset"):
        open_source(DataLoader(Squares()))


@pytest.mark.parametrize(
    "source", [b"x.tar", {"a": 1}, torch.zeros(3), torch.nn.Sequential(), 7, None, print, object()]
)
def test_what_is_no_source_is_refused_with_what_to_pass(source: Any) -> None:
    with pytest.raises(ConfigError, match="Pass paths of tar shards"):
        open_source(source)


def test_paths_open_as_tar_shards_and_sources_pass_through(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, num_shards=2, examples_per_shard=2)
    for written in (paths, tuple(paths), f"{tmp_path}/*.tar", [Path(path) for path in paths]):
        source = open_source(written)
        assert isinstance(source, TarSource)
        assert [source.shard_name(i) for i in range(2)] == paths
        assert open_source(source) is source
    assert open_source(Path(paths[0])).num_shards == 1


def test_wrong_addresses_fail_when_the_source_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ShardUnavailableError):
        open_source(str(tmp_path / "gone.tar"))
    with pytest.raises(UnsafeDataError):
        open_source("pipe:cat x.tar")
    with pytest.raises(ConfigError, match="empty"):
        open_source([])


def test_values_that_are_ready_stay_the_same_objects() -> None:
    image, _ = draw(3)
    (example,) = read([{"image": image, "text": "t", **make_example(3)}])
    assert example["image"] is image
    assert example["__key__"] == "000003"


class Bare:
    """A source of one's own, of no class of ours, with the members that a source must have."""

    num_shards = 2
    fingerprint = "bare"

    def shard_name(self, shard: int) -> str:
        return f"shard {shard}"

    def read(self, shard: int, *, offset: int = 0, index: int = 0) -> Iterator[tuple[Example, int]]:
        for number in range(index, 3):
            yield {"__key__": f"{shard}/{number}"}, number + 1


class Complete(Bare):
    """The same with the members that a source may have."""

    num_examples = [3, 3]

    def __init__(self) -> None:
        self.is_closed = False

    def shard_content(self, shard: int) -> tuple[int, str]:
        return 10 + shard, "etag"

    def take_counts(self) -> dict[str, int]:
        return {"requests": 7}

    def close(self) -> None:
        self.is_closed = True


def test_an_object_with_the_members_of_a_source_is_one() -> None:
    opened = pickle.loads(pickle.dumps(open_source(Bare())))
    assert isinstance(opened, Source) and open_source(opened) is opened
    assert (opened.num_shards, opened.fingerprint, opened.shard_name(1)) == (2, "bare", "shard 1")
    assert [step[0]["__key__"] for step in opened.read(1, index=1)] == ["1/1", "1/2"]
    assert opened.num_examples is None and opened.shard_content(0) is None
    assert opened.take_counts() == {}
    opened.close()


def test_members_that_a_source_may_have_are_used_where_an_object_has_them() -> None:
    complete = Complete()
    opened = open_source(complete)
    assert opened.num_examples == [3, 3] and opened.shard_content(1) == (11, "etag")
    assert opened.take_counts() == {"requests": 7}
    opened.close()
    assert complete.is_closed


def test_a_source_of_the_user_is_closed_by_the_user() -> None:
    complete = Complete()
    with tiny_dataset(complete):
        pass
    assert not complete.is_closed
