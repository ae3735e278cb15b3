"""A cache holds what the reference gives, and its files depend on the embedded data alone.

pytest tests/reference_cache/test_build.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from PIL import Image
from support import cache_builds as builds
from support.cache_builds import NUM_SHARDS, PER_SHARD, files_of
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, flipped, to_tensor, tokenize
from support.shards import draw, make_example, members, write_shards, write_tar
from torch.nn import functional as F

from jest_stream import IterableSource, ReferenceCache, TarSource
from jest_stream.errors import (
    BadExampleError,
    ConfigError,
    IncompleteCacheError,
    NonFiniteError,
    ReferenceMismatchError,
)
from jest_stream.types import REFERENCE_ROW
from jest_stream.views.columns import gather_rows

SHARDS = {"num_shards": NUM_SHARDS, "examples_per_shard": PER_SHARD}

pytestmark = pytest.mark.usefixtures("no_leaks")

build = partial(builds.build, micro_batch_size=5)


def test_every_shard_is_an_arrow_file_that_pyarrow_alone_reads(
    shards: list[str], tmp_path: Path
) -> None:
    cache = build(shards, tmp_path / "cache")
    assert (cache.num_examples, cache.dimension) == (NUM_SHARDS * PER_SHARD, 16)
    reference = TinyTwoTower(2)
    for shard in range(NUM_SHARDS):
        path = tmp_path / "cache" / f"{shard:05d}.arrow"
        with pyarrow.memory_map(str(path)) as file:
            table = pyarrow.ipc.open_file(file).read_all()
        assert table.schema.names == ["key", "image", "text", "image_crc32", "text_crc32"]
        assert table.schema.field("image").type == pyarrow.list_(pyarrow.float16(), 16)
        expected = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        assert table["key"].to_pylist() == [f"{index:06d}" for index in expected]
        pairs = [draw(index) for index in expected]
        texts = torch.stack([tokenize(caption) for _, caption in pairs])
        found = torch.tensor(table["text"].to_pylist())
        live = F.normalize(reference.encode_text(texts), dim=-1)
        assert torch.allclose(found, live, atol=1e-3)


def test_what_is_read_in_step_is_what_the_reference_gives(
    shards: list[str], tmp_path: Path
) -> None:
    joined = build(shards, tmp_path / "cache").join(source := TarSource(shards))
    reference = TinyTwoTower(2)
    for shard in range(NUM_SHARDS):
        plain = [example for example, _ in source.read(shard)]
        for (example, _), expected in zip(joined.read(shard), plain, strict=True):
            assert isinstance(example, dict) and isinstance(expected, dict)
            images, texts, _, row = example.pop(REFERENCE_ROW)
            image, text = images[row], texts[row]
            assert example == expected
            pixels = to_tensor(decode(expected))
            live = F.normalize(reference.encode_image(pixels[None]), dim=-1)[0]
            assert torch.allclose(image.float(), live, atol=1e-3)
            words = F.normalize(
                reference.encode_text(tokenize(expected["txt"].decode())[None]), dim=-1
            )[0]
            assert torch.allclose(text.float(), words, atol=1e-3)


def decode(example: Any) -> Image.Image:
    import io

    return Image.open(io.BytesIO(example["jpg"])).convert("RGB")


def test_the_manifest_names_reference_views_and_shards(shards: list[str], tmp_path: Path) -> None:
    build(shards, tmp_path / "cache", text_key="txt")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["version"] == 2 and manifest["dimension"] == 16
    assert manifest["logit_scale"] == pytest.approx(torch.tensor(2.0).exp().item())
    assert manifest["logit_bias"] == -3.0
    assert manifest["text_key"] == "txt"
    assert len(manifest["weights"]) == 32 and manifest["transform"][0]["outputs"]
    assert manifest["source"] == TarSource(shards).fingerprint
    assert [shard["name"] for shard in manifest["shards"]] == [Path(s).name for s in shards]
    assert manifest["shards"][1]["num_bytes"] == Path(shards[1]).stat().st_size
    assert manifest["shards"][1]["num_read"] == PER_SHARD


@pytest.mark.timeout(300)
def test_files_are_the_same_for_any_number_of_ranks_and_workers(
    shards: list[str], tmp_path: Path
) -> None:
    build(shards, tmp_path / "alone")
    expected = files_of(tmp_path / "alone")
    build(shards, tmp_path / "workers", num_workers=2)
    assert files_of(tmp_path / "workers") == expected
    for rank in (2, 0, 1):
        cache = build(shards, tmp_path / "ranks", rank=rank, world_size=3)
        if rank != 1:
            with pytest.raises(IncompleteCacheError, match=r"[1-4] of 5 shards are done"):
                _ = cache.manifest
    assert cache.num_examples == NUM_SHARDS * PER_SHARD
    assert files_of(tmp_path / "ranks") == expected


def test_ranks_are_those_of_torchrun(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    build(shards, tmp_path / "cache")
    done = sorted(path.stem for path in (tmp_path / "cache").glob("*.arrow"))
    assert done == ["00001", "00003"]


def test_a_build_goes_on_with_what_is_missing(shards: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    build(shards, folder)
    expected = files_of(folder)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    missing = ["00003.json", "manifest.json", "00001.arrow", "00001.json"]
    for name in missing:  # of 00003, the file is there but nobody says that it is whole
        (folder / name).unlink()
    build(shards, folder)
    assert files_of(folder) == expected
    redone = {path.name for path in folder.iterdir() if kept[path.name] != path.stat().st_mtime_ns}
    assert redone == {*missing, "00003.arrow"}


def test_a_complete_cache_is_not_built_again(shards: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    build(shards, folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert build(shards, folder).num_examples == NUM_SHARDS * PER_SHARD
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, "weights was '.*', is '"),
        ({"transform": lambda image: to_tensor(image) * 2}, "another transform: for the image"),
        ({"tokenizer": lambda text: tokenize(text + " x")}, "another tokenizer: for the text"),
        ({"text_key": "json"}, "text_key was 'txt;text', is 'json'"),
        ({"micro_batch_size": 6}, "micro_batch_size was 5, is 6"),
    ],
)
def test_a_folder_with_another_cache_is_refused(
    shards: list[str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    build(shards, tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    with pytest.raises(ReferenceMismatchError, match=message):
        build(shards, tmp_path / "cache", **change)
    with pytest.raises(ReferenceMismatchError, match="num_shards was 5, is 4|source was"):
        build(shards[:-1], tmp_path / "cache")
    assert files_of(tmp_path / "cache") == before


def test_a_random_view_cannot_be_cached(shards: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the transform of the reference gives something else"):
        build(shards, tmp_path / "cache", transform=flipped)
    assert not (tmp_path / "cache").exists()


def test_a_reference_that_gives_nan_writes_nothing(shards: list[str], tmp_path: Path) -> None:
    reference = TinyTwoTower(2)
    with torch.no_grad():
        reference.image[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"NaN or infinity.*'0000\d.tar'"):
        ReferenceCache.build(
            shards, reference, tmp_path / "cache", transform=to_tensor, tokenizer=tokenize
        )
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["build.json"]


def with_bad_examples(folder: Path) -> list[str]:
    """Two shards of 20; examples 3, 4 and 19 of the first have no readable image."""
    paths = []
    for shard in range(2):
        examples = [make_example(index + 20 * shard) for index in range(20)]
        for position in (3, 4, 19) if shard == 0 else ():
            examples[position]["jpg"] = b"no picture"
        paths.append(write_tar(folder / f"{shard}.tar", members(examples)))
    return paths


def test_bad_examples_raise_or_are_left_out_and_counted(tmp_path: Path) -> None:
    paths = with_bad_examples(tmp_path)
    with pytest.raises(BadExampleError, match="000003"):
        build(paths, tmp_path / "strict")
    whole = build(paths, tmp_path / "cache", on_bad_example="skip")
    assert whole.num_examples == 37
    first, second = whole.shards
    assert (first.num_read, first.num_examples, sum(first.skipped.values())) == (20, 17, 3)
    assert (second.num_read, second.num_examples, dict(second.skipped)) == (20, 20, {})
    build(paths, tmp_path / "workers", on_bad_example="skip", num_workers=2)
    assert files_of(tmp_path / "workers") == files_of(tmp_path / "cache")
    found = [example for example, _ in whole.join(TarSource(paths)).read(0)]
    bad = [error for error in found if isinstance(error, BadExampleError)]
    assert [error.key for error in bad] == ["000003", "000004", "000019"]
    assert {error.reason for error in bad} == {"not_cached"}


def image_row(example: Any) -> torch.Tensor:
    images, *_, row = example[REFERENCE_ROW]
    return images[row]


class Captions:
    """A stream of ready examples, which may end early, as a killed process does."""

    def __init__(self, number: int, *, fails_at: int | None = None) -> None:
        self.number, self.fails_at, self.num_given = number, fails_at, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in range(self.number):
            if index == self.fails_at:
                raise KeyboardInterrupt
            image, caption = draw(index)
            self.num_given += 1
            yield {"__key__": f"k{index}", "image": image, "text": caption}


def test_a_source_without_shards_is_cached_in_parts_and_goes_on(tmp_path: Path) -> None:
    build(Captions(200), tmp_path / "once", part_size=40)
    names = sorted(path.name for path in (tmp_path / "once").glob("*.arrow"))
    assert names == [*(f"00000-0000{part}.arrow" for part in range(5)), "00000.index.arrow"]
    with pytest.raises(KeyboardInterrupt):
        build(Captions(200, fails_at=150), tmp_path / "twice", part_size=40)
    parts = sorted(path.name for path in (tmp_path / "twice").glob("*.json"))
    assert parts == ["00000-00000.json", "00000-00001.json", "00000-00002.json", "build.json"]
    kept = (tmp_path / "twice" / "00000-00001.arrow").stat().st_mtime_ns
    build(Captions(200), tmp_path / "twice", part_size=40)
    assert (tmp_path / "twice" / "00000-00001.arrow").stat().st_mtime_ns == kept
    assert files_of(tmp_path / "twice") == files_of(tmp_path / "once")


@pytest.mark.parametrize("part_size", [7, 20, 45, 100])
def test_parts_are_found_in_order_and_out_of_order(tmp_path: Path, part_size: int) -> None:
    cache = build(Captions(45), tmp_path / "cache", part_size=part_size)
    examples = list(Captions(45))
    expected = {
        example["__key__"]: image_row(example).clone()
        for example, _ in cache.join(IterableSource(examples)).read(0)
    }
    assert len(expected) == 45
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        order = torch.randperm(45, generator=generator).tolist()
        shuffled = cache.join(IterableSource([examples[i] for i in order]))
        for example, _ in shuffled.read(0):
            assert torch.equal(image_row(example), expected[example["__key__"]])
    for start in (0, 1, 19, 20, 44, 45):
        rest = list(cache.join(IterableSource(examples)).read(0, index=start))
        assert [example["__key__"] for example, _ in rest] == [f"k{i}" for i in range(start, 45)]


@pytest.mark.parametrize("indices", [range(30), range(1, 45, 2), [*range(45), 7]], ids=str)
def test_a_stream_of_some_of_the_keys_is_joined(tmp_path: Path, indices: Any) -> None:
    cache = build(Captions(45), tmp_path / "cache", part_size=20)
    examples = list(Captions(45))
    stream = IterableSource([examples[index] for index in indices])
    found = [example for example, _ in cache.join(stream).read(0)]
    assert [example["__key__"] for example in found] == [f"k{index}" for index in indices]


def test_keys_that_come_twice_are_refused(tmp_path: Path) -> None:
    examples = [{**example, "__key__": "same"} for example in Captions(3)]
    with pytest.raises(ConfigError, match="2 keys of shard '<list>' come twice"):
        build(examples, tmp_path / "cache")


def test_one_file_is_mapped_at_a_time_and_let_go_with_its_shard(
    shards: list[str], tmp_path: Path
) -> None:
    joined = build(shards, tmp_path / "cache").join(TarSource(shards))

    def mapped() -> list[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line for line in lines if str(tmp_path) in line]

    for shard in range(NUM_SHARDS):
        reading = joined.read(shard)
        columns = gather_rows([example[REFERENCE_ROW] for example, _ in reading])
        assert len(columns[0]) == PER_SHARD
    assert mapped() == []
    first, second = joined.read(0), joined.read(1)
    kept = [next(first), next(second)]
    assert len({line.split()[-1] for line in mapped()}) == 2
    first.close()
    second.close()
    del kept
    assert mapped() == []


def test_an_empty_shard_has_a_record_and_no_file(tmp_path: Path) -> None:
    paths = [*write_shards(tmp_path, num_shards=1), write_tar(tmp_path / "empty.tar", [])]
    cache = build(paths, tmp_path / "cache")
    assert [record.num_examples for record in cache.shards] == [16, 0]
    assert list(cache.join(TarSource(paths)).read(1)) == []
