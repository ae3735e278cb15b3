"""However a loop ends, no thread, process or file is left, and nothing hangs.

pytest tests/test_lifecycle.py
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.endings import EARLY_ENDS, assert_no_worker_outlives
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, tokenize
from support.models import tiny_dataset as jest
from support.shards import write_shards
from torch.utils.data import DataLoader

from jest_stream import SelectionConfig
from jest_stream.errors import (
    ClosedError,
    JESTError,
    ShardTruncatedError,
    UserCodeError,
    WrongProcessError,
)

pytestmark = pytest.mark.usefixtures("no_leaks")


def alive() -> tuple[int, int, int]:
    """Child processes, threads, open shard files."""
    process = psutil.Process()
    children = [c for c in process.children() if c.status() != psutil.STATUS_ZOMBIE]
    files = [file for file in process.open_files() if file.path.endswith(".tar")]
    return len(children), threading.active_count(), len(files)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_break_leaves_nothing_and_loses_nothing(shards: list[str], num_workers: int) -> None:
    expected = [batch["key"] for batch in islice(jest(shards), 5)]
    before = alive()
    dataset = jest(shards, num_workers=num_workers)
    seen = []
    for batch in dataset:
        seen.append(batch["key"])
        if len(seen) == 2:
            assert alive() != before
            break
    assert alive() == before
    seen += [batch["key"] for batch in islice(dataset, 3)]
    assert seen == expected
    assert alive() == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_in_the_loop_leaves_nothing(shards: list[str], num_workers: int) -> None:
    before = alive()
    dataset = jest(shards, num_workers=num_workers)
    with pytest.raises(ZeroDivisionError):
        for _ in DataLoader(dataset, batch_size=None):
            raise ZeroDivisionError
    assert alive() == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_close_leaves_nothing_and_may_be_called_twice(shards: list[str], num_workers: int) -> None:
    before = alive()
    dataset = jest(shards, num_workers=num_workers)
    iterator = iter(dataset)
    next(iterator)
    dataset.close()
    assert alive() == before
    dataset.close()
    assert "closed" in repr(dataset)
    with pytest.raises(RuntimeError, match="this JESTDataset is closed"):
        next(iterator)


def test_a_closed_dataset_keeps_its_state_and_lets_go_of_the_models(shards: list[str]) -> None:
    learner, reference = TinyTwoTower(seed=1), TinyTwoTower(seed=2)
    dataset = jest(shards, learner=learner, reference=reference, lookahead=2)
    expected = [batch["key"] for batch in islice(jest(shards, lookahead=2), 5)]
    assert [batch["key"] for batch in islice(dataset, 2)] == expected[:2]
    before = dataset.state_dict()
    dataset.close()
    assert dataset.state_dict() == before
    released = weakref.ref(reference), weakref.ref(learner)
    del reference, learner
    gc.collect()
    assert [reference() for reference in released] == [None, None]
    with pytest.raises(ClosedError, match="this JESTDataset is closed"):
        dataset.state_dict(include_learner_copy=True)
    with pytest.raises(ClosedError):
        dataset.set_epoch(1)
    resumed = jest(shards, lookahead=2)
    resumed.load_state_dict(dataset.state_dict())
    assert [batch["key"] for batch in islice(resumed, 3)] == expected[2:]
    never_used = jest(shards)
    never_used.close()
    with pytest.raises(ClosedError):
        never_used.state_dict()


@pytest.mark.parametrize("kind", [ClosedError, WrongProcessError, UserCodeError])
def test_errors_of_the_wrong_time_or_place_are_ours_and_pythons(kind: type[Exception]) -> None:
    assert issubclass(kind, JESTError) and issubclass(kind, RuntimeError)


def test_with_closes_and_so_does_dropping_the_last_name(shards: list[str]) -> None:
    before = alive()
    with jest(shards, num_workers=2, steps_per_epoch=2) as dataset:
        assert len(list(dataset)) == 2
        assert alive() != before  # workers wait for the next epoch
    assert alive() == before
    dataset = jest(shards, num_workers=2, steps_per_epoch=2)
    assert len(list(dataset)) == 2
    del dataset
    gc.collect()
    assert alive() == before


def test_a_newer_iterator_takes_over_and_the_older_says_so(shards: list[str]) -> None:
    expected = [batch["key"] for batch in islice(jest(shards), 3)]
    dataset = jest(shards)
    older = iter(dataset)
    seen = [next(older)["key"]]
    newer = iter(dataset)
    with pytest.raises(RuntimeError, match=r"a newer iter\(dataset\) has taken over"):
        next(older)
    older.close()
    seen += [batch["key"] for batch in islice(newer, 2)]
    assert seen == expected


def test_an_ended_iterator_stays_ended(shards: list[str]) -> None:
    for options in ({"repeat": False}, {"steps_per_epoch": 3}):
        iterator = iter(jest(shards, **options))
        assert len(list(iterator)) > 0
        assert next(iterator, None) is None
        assert next(iterator, None) is None


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("lookahead", [0, 2])
def test_an_error_comes_after_the_batches_before_it_and_leaves_nothing(
    tmp_path: Path, num_workers: int, lookahead: int
) -> None:
    paths = write_shards(tmp_path, num_shards=2, examples_per_shard=16)
    expected = [batch["key"] for batch in islice(jest(paths), 2)]
    for path in paths:  # cut after 13 of 16 examples, at a member boundary
        data = Path(path).read_bytes()
        cut = data.index(b"13.jpg" if path == paths[0] else b"29.jpg")
        Path(path).write_bytes(data[: cut - cut % 512])
    before = alive()
    iterator = iter(jest(paths, num_workers=num_workers, lookahead=lookahead))
    assert [next(iterator)["key"] for _ in range(2)] == expected
    next(iterator)
    for _ in range(2):
        with pytest.raises(ShardTruncatedError) as caught:
            next(iterator)
        assert caught.value.shard in paths
    del caught
    assert alive() == before


def test_an_error_in_user_code_keeps_its_type_and_stops_at_its_place(shards: list[str]) -> None:
    def picky(text: str) -> Any:
        if "circle" in text:
            raise LookupError(f"no circles: {text}")
        return tokenize(text)

    for num_workers in (0, 2):
        with pytest.raises(LookupError, match="no circles"):
            list(islice(jest(shards, tokenizer=picky, num_workers=num_workers), 9))


SCRIPT = """
import sys
from support.endings import come_to
from support.models import TinyTwoTower, flipped, to_tensor, tokenize
from jest_stream import JESTDataset
dataset = JESTDataset(sys.argv[2:], learner=TinyTwoTower(1), reference=TinyTwoTower(2),
                      transform=to_tensor, tokenizer=tokenize, train_transform=flipped,
                      batch_size=4, super_batch_size=8, num_workers=2)
iterator = iter(dataset)
next(iterator)
come_to(sys.argv[1], lambda: next(iterator))
"""


@pytest.mark.parametrize("end", EARLY_ENDS)
def test_no_worker_outlives_the_interpreter(shards: list[str], end: str) -> None:
    """Neither of the two that read, nor of the two that make train views."""
    assert_no_worker_outlives(SCRIPT, end, shards, num_workers=4)


def test_iterating_in_a_worker_of_a_data_loader_says_what_to_do(shards: list[str]) -> None:
    loader = DataLoader(jest(shards), batch_size=None, num_workers=1)
    iterator = iter(loader)
    with pytest.raises(RuntimeError, match=r"num_workers=0\), and JESTDataset\(num_workers=1\)"):
        next(iterator)
    del iterator
    gc.collect()  # the error's traceback and torch's iterator hold each other


def test_files_and_threads_stay_the_same_over_many_epochs(shards: list[str]) -> None:
    dataset = jest(
        shards, repeat=False, selection=SelectionConfig(method="uniform"), super_batch_size=8
    )
    list(dataset)
    before = alive()
    for _ in range(30):
        list(dataset)
    assert alive() == before


@pytest.mark.parametrize("argument", ["transform", "train_transform"])
def test_user_code_that_raises_stop_iteration_does_not_end_training_in_silence(
    shards: list[str], argument: str
) -> None:
    def exhausted(image: Any) -> Any:
        return next(iter(()))

    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(islice(jest(shards, **{argument: exhausted}), 3))


def test_a_dataset_is_not_copied_away_from_its_learner(shards: list[str]) -> None:
    dataset = jest(shards)
    assert dataset  # though it has no length
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="JESTDataset cannot be copied"):
            duplicate(dataset)


def test_a_script_that_closes_nothing_ends_quietly(shards: list[str]) -> None:
    """Neither a dataset in the middle of its stream nor one at the end of its epoch."""
    script = f"""{SCRIPT}
ended = JESTDataset(sys.argv[2:], learner=TinyTwoTower(1), reference=TinyTwoTower(2), batch_size=4,
                    transform=to_tensor, tokenizer=tokenize, steps_per_epoch=2)
assert len(list(ended)) == 2
"""
    assert_no_worker_outlives(script, "end", shards, num_workers=4)
