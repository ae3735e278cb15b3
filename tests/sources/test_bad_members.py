"""Faults within whole archives are bad examples on every source: raised, or skipped and counted.

pytest tests/sources/test_bad_members.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.models import TinyTwoTower, to_tensor, tokenize
from support.remote import nothing_survives  # noqa: F401
from support.shards import make_example, members, write_tar
from test_tar_faults import Put, bucket, put  # noqa: F401  fixtures: local, http, s3, hub

from jest_stream import JESTDataset, SelectionConfig, TarSource
from jest_stream.errors import BadExampleError

NUM_GOOD = 8


def jest(source: Any, **options: Any) -> JESTDataset:
    return JESTDataset(
        source,
        learner=TinyTwoTower(seed=1),
        selection=SelectionConfig(method="uniform"),
        transform=to_tensor,
        tokenizer=tokenize,
        batch_size=4,
        filter_ratio=0.0,
        repeat=False,
        as_dict=True,
        **options,
    )


def faulty(fault: str) -> list[tuple[str, bytes]]:
    """Good examples with a bad one among them."""
    files = members(make_example(index) for index in range(NUM_GOOD))
    bad = members([{**make_example(99), "__key__": "bad"}])
    if fault == "a member twice":
        bad.insert(1, bad[0])
    elif fault == "an example twice":
        bad = members([make_example(0)])
    elif fault == "no image":
        bad = [(name, data) for name, data in bad if not name.endswith(".jpg")]
    elif fault == "no text":
        bad = [(name, data) for name, data in bad if not name.endswith(".txt")]
    else:
        assert fault == "a text that is not UTF-8"
        bad = [(name, b"caf\xe9" if name.endswith(".txt") else data) for name, data in bad]
    return [*files[:9], *bad, *files[9:]]


FAULTS = {
    "a member twice": "duplicate_member",
    "an example twice": "duplicate_key",
    "no image": "missing_image",
    "no text": "missing_text",
    "a text that is not UTF-8": "unreadable_text",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_raised_or_skipped_and_counted(put: Put, tmp_path: Path, fault: str) -> None:  # noqa: F811
    source = put(Path(write_tar(tmp_path / "made.tar", faulty(fault))).read_bytes())
    with jest(source) as dataset, pytest.raises(BadExampleError) as caught:
        list(dataset)
    assert caught.value.reason == FAULTS[fault]
    assert source.shard_name(0) in str(caught.value)
    del caught
    with jest(source, on_bad_example="skip") as dataset:
        keys = [key for batch in dataset for key in batch["key"]]
        metrics = dataset.metrics()
    assert sorted(keys) == [f"{index:06d}" for index in range(NUM_GOOD)]
    assert {name: n for name, n in metrics.items() if name.startswith("skipped/")} == {
        f"skipped/{FAULTS[fault]}": 1
    }
    source.close()


def test_a_key_that_another_shard_has_too_is_another_example(tmp_path: Path) -> None:
    paths = []
    for shard in range(2):
        examples = [
            {**make_example(index), "txt": f"{shard}-{index}".encode()} for index in range(4)
        ]
        paths.append(write_tar(tmp_path / f"{shard}.tar", members(examples)))
    source = TarSource(paths)
    read = [step[0]["txt"] for shard in range(2) for step in source.read(shard)]  # type: ignore[index]
    assert read == [f"{shard}-{index}".encode() for shard in range(2) for index in range(4)]
    with jest(source) as dataset:
        keys = [key for batch in dataset for key in batch["key"]]
    assert sorted(keys) == sorted(2 * [f"{index:06d}" for index in range(4)])
