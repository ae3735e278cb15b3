"""Parquet files give the same examples from any row on, and damage is never a shorter file.

pytest tests/sources/test_parquet.py
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support.hub_server import parquet_of
from support.leaks import no_leaks  # noqa: F401
from support.shards import make_example

from jest_stream.errors import (
    BadExampleError,
    ConfigError,
    ShardError,
    ShardTruncatedError,
    ShardUnavailableError,
    UnsafeDataError,
    UnsafeExampleError,
)
from jest_stream.sources.parquet import ParquetFile, ParquetSource
from jest_stream.views.decode import Decoded

pytestmark = pytest.mark.usefixtures("no_leaks")

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def source(*paths: Path, **options: Any) -> ParquetSource:
    return ParquetSource([ParquetFile(str(path), None, path.stem) for path in paths], **options)


def write(path: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=4)
    return path


def images(number: int) -> Any:
    return pyarrow.array([{"bytes": b"%d" % i, "path": None} for i in range(number)], IMAGE)


@pytest.fixture
def examples() -> list[dict[str, Any]]:
    return [make_example(index) for index in range(50)]


@pytest.fixture
def pairs(tmp_path: Path, examples: list[dict[str, Any]]) -> Path:
    path = tmp_path / "pairs.parquet"
    path.write_bytes(parquet_of(examples, rows_per_group=20))
    return path


def test_rows_are_examples_with_encoded_images(pairs: Path, examples: list[dict[str, Any]]) -> None:
    read = [example for example, _ in source(pairs).read(0)]
    assert [example["image"] for example in read] == [example["jpg"] for example in examples]
    assert [example["text"].encode() for example in read] == [e["txt"] for e in examples]
    assert [example["index"] for example in read] == list(range(50))
    assert read[7]["__key__"] == "pairs/7" and read[7]["__shard__"] == str(pairs)
    assert Decoded(read[0])["image"].size == (32, 32)


def test_reading_goes_on_at_any_row(pairs: Path) -> None:
    rows = source(pairs)
    whole = list(rows.read(0))
    assert [after for _, after in whole] == list(range(1, 51))
    for start in range(51):
        assert list(rows.read(0, offset=start, index=start)) == whole[start:]


def test_resuming_reads_only_the_row_group_it_stopped_in(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    noise = [{"bytes": bytes([i]) * 200_000, "path": None} for i in range(40)]
    table = pyarrow.table({"image": pyarrow.array(noise, IMAGE), "text": ["x"] * 40})
    parquet.write_table(table, path, row_group_size=10, compression="none", use_dictionary=False)
    opened = Counting(path)
    rows = source(path)
    rows._storage = opened  # type: ignore[assignment]
    assert len(list(rows.read(0, offset=35))) == 5
    assert opened.num_bytes < 2_600_000  # of 8,000,000; a row group holds 2,000,000


class Counting:
    """A storage that counts what is read of its one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0

    def open(self, url: str, expected: object) -> io.BufferedReader:
        del url, expected
        counting = self

        class File(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                number = super().readinto(buffer) or 0
                counting.num_bytes += number
                return number

        return io.BufferedReader(File(self.path), 4096)


def test_the_number_of_rows_is_known_from_the_footers(pairs: Path, tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.parquet", image=images(0), text=pyarrow.array([], "string"))
    rows = source(pairs, empty)
    assert list(rows.num_examples) == [50, 0]
    assert list(rows.read(1)) == []


def test_a_source_can_be_sent_to_another_process(pairs: Path) -> None:
    rows = source(pairs)
    again = pickle.loads(pickle.dumps(rows))
    assert list(again.read(0, offset=48)) == list(rows.read(0, offset=48))


@pytest.mark.parametrize(
    ("columns", "image", "text"),
    [
        ({"image": images(4), "text": list("abcd")}, "image", "text"),
        ({"photo": images(4), "caption": list("abcd"), "url": list("abcd")}, "photo", "caption"),
        ({"jpg": [b"1"] * 4, "txt": list("abcd"), "__key__": list("wxyz")}, "jpg", "txt"),
        ({"x": [b"1"] * 4, "y": list("abcd"), "blob": images(4)}, "blob", "y"),
    ],
)
def test_image_and_text_are_found(
    tmp_path: Path, columns: dict[str, Any], image: str, text: str
) -> None:
    rows = source(write(tmp_path / "a.parquet", **columns))
    assert (rows.fields.image, rows.fields.text) == (image, text)
    read = [example for example, _ in rows.read(0)]
    assert all(isinstance(example["image"], bytes) for example in read)
    assert [example["text"] for example in read] == list("abcd")
    if "__key__" in columns:
        assert [example["__key__"] for example in read] == list("wxyz")


def test_declared_images_win_over_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_of([make_example(0)]))
    table = parquet.read_table(path).append_column("image2", pyarrow.array([{"bytes": b"x"}]))
    parquet.write_table(table, path)
    assert source(path).fields.image == "image"
    assert source(path, image_key="image2").fields.image == "image2"


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": images(2), "b": images(2), "text": ["x", "y"]}, {}, "2 columns that could be the i"),
        ({"image": images(2), "u": ["x", "y"], "v": ["x", "y"]}, {}, r"u \(string\), v \(string\)"),
        ({"image": images(2), "n": [1, 2]}, {}, "no column of texts"),
        ({"text": ["x", "y"]}, {}, "no column of images"),
        ({"image": images(2), "text": ["x", "y"]}, {"text_key": "cap"}, "text_key='cap' is no col"),
        ({"image": images(2), "text": ["x", "y"]}, {"image_key": "text"}, "image_key='text' is a"),
        ({"image": images(2), "text": [["x"], ["y"]]}, {"text_key": "text"}, "a text is a string"),
        ({"image": images(2), "m": [{"a": "x"}] * 2}, {"text_key": "m.b"}, "'m.b' is no column"),
    ],
)
def test_columns_that_cannot_be_told_are_listed(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], message: str
) -> None:
    path = write(tmp_path / "a.parquet", **columns)
    with pytest.raises(ConfigError, match=message):
        source(path, **options)


def test_a_caption_within_a_struct_can_be_named(tmp_path: Path) -> None:
    meta = [{"caption": text, "tags": ["t"], "size": 3} for text in "abcd"]
    path = write(tmp_path / "a.parquet", image=images(4), meta=meta)
    read = [example for example, _ in source(path, text_key="meta.caption").read(0)]
    assert [example["text"] for example in read] == list("abcd")
    assert read[0]["meta"] == {"caption": "a", "tags": ["t"], "size": 3}


def test_image_and_caption_may_share_a_struct(tmp_path: Path) -> None:
    pairs = [{"img": {"bytes": b"%d" % i, "path": None}, "cap": str(i)} for i in range(9)]
    path = write(tmp_path / "a.parquet", pair=pairs)
    rows = source(path, image_key="pair.img", text_key="pair.cap")
    read = [example for example, _ in rows.read(0, offset=5)]
    assert [(example["image"], example["text"]) for example in read] == [
        (b"%d" % i, str(i)) for i in range(5, 9)
    ]


def test_columns_named_as_what_we_add_change_nothing_of_it(tmp_path: Path) -> None:
    ours = {"__key__": [7, 8], "__shard__": ["x", "x"], "__reference__": [1, 2]}
    path = write(tmp_path / "a.parquet", image=images(2), text=["a", "b"], n=[3, 4], **ours)
    examples = [example for example, _ in source(path).read(0)]
    assert [example.pop("__key__") for example in examples] == ["7", "8"]
    assert {example.pop("__shard__") for example in examples} == {str(path)}
    assert [sorted(example) for example in examples] == [["image", "n", "text"]] * 2


def test_what_was_not_chosen_is_not_taken_for_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", image=images(2), txt=["no", "no"], caption=["a", "b"])
    example, _ = next(source(path, text_key="caption").read(0))
    assert isinstance(example, dict)
    assert example["text"] == "a" and example["caption"] == "a" and "txt" not in example


def test_nulls_are_left_out(tmp_path: Path) -> None:
    held = pyarrow.array(
        [{"bytes": b"1", "path": None}, {"bytes": None, "path": None}, None], IMAGE
    )
    path = write(tmp_path / "a.parquet", image=held, text=[None, "b", "c"], n=[1, None, 3])
    first, second, third = (example for example, _ in source(path).read(0))
    assert isinstance(first, dict) and isinstance(second, dict) and isinstance(third, dict)
    assert "text" not in first and first["image"] == b"1"
    assert "image" not in second and "n" not in second
    assert "image" not in third and third["text"] == "c"


def test_paths_to_images_are_never_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    held = pyarrow.array([{"bytes": None, "path": str(secret)}], IMAGE)
    path = write(tmp_path / "a.parquet", image=held, text=["a"])
    example, _ = next(source(path).read(0))
    assert "image" not in example  # type: ignore[operator]


def test_bad_text_is_a_bad_example_and_reading_goes_on(tmp_path: Path) -> None:
    texts = pyarrow.array([b"a", b"\xff\xfe", b"c" * (1 << 20) + b"c", b"d"]).view("string")
    path = write(tmp_path / "a.parquet", image=images(4), text=texts)
    first, second, third, fourth = (example for example, _ in source(path).read(0))
    assert isinstance(first, dict) and isinstance(fourth, dict)
    assert isinstance(second, BadExampleError) and second.reason == "unreadable_text"
    assert isinstance(third, UnsafeExampleError) and third.reason == "unsafe_text"
    assert fourth["text"] == "d"


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_is_an_error(pairs: Path, share: float) -> None:
    rows, data = source(pairs), pairs.read_bytes()
    pairs.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ShardTruncatedError, match=r"pairs\.parquet.* was cut off"):
        list(rows.read(0))
    with pytest.raises(ShardTruncatedError):
        source(pairs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "was cut off"),
        (b"<html>" + b"not found" * 30, "is no parquet file"),
        (b"PAR1" + bytes(200) + b"PAR1", "is damaged"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(ShardError, match=message) as caught:
        source(path)
    assert caught.value.shard == str(path)


def test_damage_within_a_row_group_names_the_file(pairs: Path) -> None:
    rows = source(pairs)
    data = bytearray(pairs.read_bytes())
    data[2_000:12_000] = bytes(10_000)
    pairs.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=r"pairs\.parquet.* is damaged"):
        list(rows.read(0))


def test_a_file_without_the_columns_of_the_first_is_an_error(pairs: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.parquet", image=images(2), caption=["a", "b"])
    with pytest.raises(ShardError, match="has no column 'text', which the first file"):
        list(source(pairs, other).read(1))


def test_a_missing_file_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(ShardUnavailableError):
        source(tmp_path / "none.parquet")


def test_images_above_the_limit_are_unsafe(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", image=images(11), text=["x"] * 11)
    with pytest.raises(UnsafeDataError, match="in row 10 of .* holds 2 bytes, the limit is 1"):
        list(source(path, max_example_bytes=1).read(0))


def test_what_unpacks_to_too_much_is_refused_by_its_footer(tmp_path: Path) -> None:
    bomb = pyarrow.array([{"bytes": bytes(1 << 20), "path": None}] * 100, IMAGE)
    path = tmp_path / "bomb.parquet"
    table = pyarrow.table({"image": bomb, "text": ["x"] * 100})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    with pytest.raises(UnsafeDataError, match="unpacks .* bytes of 'image.bytes' to"):
        list(source(path).read(0))


def test_closing_a_reader_closes_its_file(pairs: Path) -> None:
    rows: Iterator[Any] = source(pairs).read(0)
    assert len(list(islice(rows, 3))) == 3
    rows.close()  # type: ignore[attr-defined]
    assert list(rows) == []
