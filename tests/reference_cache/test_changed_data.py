"""Data that changed since the reference embedded them are noticed by their content.

pytest tests/reference_cache/test_changed_data.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cache_builds import build, train_from
from support.leaks import no_leaks  # noqa: F401
from support.shards import draw, make_example, members, write_tar

from jest_stream.errors import CachedShardChangedError

pytestmark = pytest.mark.usefixtures("no_leaks")

NUM_SHARDS, PER_SHARD = 4, 12

SHARDS = {"num_shards": NUM_SHARDS, "examples_per_shard": PER_SHARD}


def rewritten(shards: list[str], change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes every example; each shard stays as long as it was."""
    for shard, path in enumerate(shards):
        size = Path(path).stat().st_size
        indices = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        write_tar(Path(path), members(change(make_example(index)) for index in indices))
        assert Path(path).stat().st_size == size


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        ("txt", b"a caption that was written anew", "the text of example '0000"),
        ("jpg", make_example(1)["jpg"], "the image of example '0000"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_captions_and_pictures_under_the_same_keys_are_noticed(
    folder: Path, own_shards: list[str], member: str, data: bytes, message: str, num_workers: int
) -> None:
    rewritten(own_shards, lambda example: {**example, member: data})
    with pytest.raises(CachedShardChangedError, match=message + r"\d\d' of shard .*") as raised:
        train_from(own_shards, str(folder), num_workers=num_workers)
    assert raised.value.shard in own_shards


@pytest.mark.parametrize(
    "text_key", ["caption.txt;txt", lambda example: example["json"]["caption"] + " again"]
)
def test_another_text_than_was_embedded_is_noticed(tmp_path: Path, text_key: Any) -> None:
    examples = [{**make_example(index), "caption.txt": b"another text"} for index in range(40)]
    paths = [write_tar(tmp_path / "0.tar", members(examples))]
    build(paths, tmp_path / "cache", text_key="txt")
    train_from(paths, str(tmp_path / "cache"), text_key=lambda example: example["json"]["caption"])
    with pytest.raises(CachedShardChangedError, match="the text of example '0000.*text_key mean"):
        train_from(paths, str(tmp_path / "cache"), text_key=text_key)


def test_what_comes_decoded_is_known_by_its_key(tmp_path: Path) -> None:
    examples = [make_example(index) for index in range(40)]
    build(examples, tmp_path / "cache")
    pictures = [
        {"__key__": e["__key__"], "jpg": draw(i)[0], "txt": e["txt"]}
        for i, e in enumerate(examples)
    ]
    train_from(pictures, str(tmp_path / "cache"))
