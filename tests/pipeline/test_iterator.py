"""An iterator ends with its epoch, gives way to a newer one, and stops the stream when dropped.

pytest tests/pipeline/test_iterator.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from support.leaks import no_leaks  # noqa: F401

from jest_stream.errors import ClosedError, UserCodeError
from jest_stream.pipeline.iterator import JESTIterator

pytestmark = pytest.mark.usefixtures("no_leaks")


class Letters:
    """A stream of letters, each a batch; notes how often its iterators paused it or ended.

    A space ends an epoch after the letter before it, as `steps_per_epoch` does; a dot ends a pass
    instead of a batch, as `repeat=False` does.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.num_pauses = self.num_rests = 0
        self.failure: BaseException | None = None  # comes once
        self._holder: object = None

    def iterator(self) -> JESTIterator:
        """A new iterator, which takes the stream over."""
        self._holder = object()
        return JESTIterator(self, self._holder)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.place = state["place"]

    def _next(self) -> tuple[Any, bool]:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        letter, following = self.text[self.place], self.text[self.place + 1 : self.place + 2]
        self.place += 2 if following == " " else 1
        return (None, True) if letter == "." else (letter, following == " ")

    def _pause(self) -> None:
        self.num_pauses += 1

    def _rest(self) -> None:
        self.num_rests += 1

    def _is_held_by(self, token: object) -> bool:
        return self._holder is token


def test_an_epoch_ends_after_its_last_batch_and_the_next_iterator_goes_on() -> None:
    letters = Letters("abc de f")
    assert list(letters.iterator()) == ["a", "b", "c"]
    assert list(letters.iterator()) == ["d", "e"]


def test_a_pass_ends_where_the_stream_has_no_more_batches() -> None:
    letters = Letters("ab.cd.")
    assert list(letters.iterator()) == ["a", "b"]
    assert list(letters.iterator()) == ["c", "d"]


@pytest.mark.parametrize("text", ["ab cd ", "ab.cd."])
def test_an_iterator_that_has_ended_stays_at_its_end(text: str) -> None:
    letters = Letters(text)
    iterator = letters.iterator()
    assert list(iterator) == ["a", "b"]
    place = letters.place
    assert list(iterator) == []
    assert letters.place == place, "nothing is drawn after the end"


@pytest.mark.parametrize("text", ["ab cd ", "ab.cd."])
def test_time_after_the_end_is_not_counted_as_training(text: str) -> None:
    letters = Letters(text)
    iterator = letters.iterator()
    next(iterator), next(iterator)
    assert letters.num_rests == 0
    assert next(iterator, "end") == "end"
    assert letters.num_rests == 1


def test_a_newer_iterator_goes_on_and_closes_the_older() -> None:
    letters = Letters("abcd")
    older = letters.iterator()
    assert next(older) == "a"
    newer = letters.iterator()
    assert next(newer) == "b"
    with pytest.raises(ClosedError, match=r"closed, because a newer iter\(dataset\) has taken ove"):
        next(older)
    assert next(newer) == "c", "the older one took no batch"


def test_an_iterator_dropped_before_its_end_pauses_the_stream() -> None:
    letters = Letters("abc def ")
    for letter in letters.iterator():
        if letter == "b":
            break
    assert letters.num_pauses == 1
    assert next(letters.iterator()) == "c"


@pytest.mark.parametrize("text", ["ab cd ", "ab.cd."])
def test_a_complete_epoch_leaves_the_workers_to_the_next_one(text: str) -> None:
    letters = Letters(text)
    assert list(letters.iterator()) == ["a", "b"]
    assert letters.num_pauses == 0


def test_dropping_or_closing_an_older_iterator_does_not_pause_the_newer() -> None:
    letters = Letters("abcd")
    older = letters.iterator()
    next(older)
    newer = letters.iterator()
    older.close()
    del older
    assert letters.num_pauses == 0
    newer.close()
    assert letters.num_pauses == 1


def test_a_closed_iterator_goes_on_where_it_stopped() -> None:
    iterator = Letters("abc").iterator()
    assert next(iterator) == "a"
    iterator.close()
    assert next(iterator) == "b"


def test_a_stop_iteration_of_the_users_code_does_not_end_the_loop_in_silence() -> None:
    letters = Letters("ab")
    letters.failure = StopIteration("of a transform")
    iterator = letters.iterator()
    with pytest.raises(UserCodeError, match="a transform, a score or a model raised StopIteration"):
        next(iterator)
    assert next(iterator) == "a"


def test_any_other_error_comes_as_it_is_and_the_iterator_goes_on() -> None:
    letters = Letters("ab")
    letters.failure = ValueError("of a transform")
    iterator = letters.iterator()
    with pytest.raises(ValueError, match="^of a transform$"):
        next(iterator)
    assert next(iterator) == "a"


def test_a_state_loaded_after_the_end_opens_the_iterator_again() -> None:
    iterator = Letters("abc ").iterator()
    assert next(iterator) == "a"
    state = iterator.state_dict()
    assert list(iterator) == ["b", "c"]
    iterator.load_state_dict(state)
    assert list(iterator) == ["b", "c"]
