"""Iterates once over a dataset's stream, until the epoch ends or the loop is dropped.

Runs in the training thread. Worker processes and open files belong to the dataset; an iterator that
is dropped has them stopped and closed, unless a newer iterator uses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from jest_stream.errors import ClosedError, UserCodeError


class BatchStream(Protocol):
    """The stream that an iterator draws from: a `JESTDataset`."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that resumes the stream after the last batch handed out."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the place where `state_dict()` was taken."""

    def _next(self) -> tuple[Any, bool]:
        """Returns one batch, or None at the end of a pass; and whether the epoch has ended."""

    def _pause(self) -> None:
        """Stops worker processes and closes files."""

    def _rest(self) -> None:
        """Notes that the loop has ended: the user's time from now on is not training."""

    def _is_held_by(self, token: object) -> bool:
        """Returns whether no newer iterator, with another token, has taken over."""


class JESTIterator(Iterator[Any]):
    """Draws from the stream of a `JESTDataset`; ends after `steps_per_epoch` batches, if given.

    Dropping it before its end, as `break` does, stops worker processes and closes files; the next
    `iter(dataset)` goes on where it stopped.
    """

    def __init__(self, stream: BatchStream, token: object) -> None:
        self._stream = stream
        # The dataset holds the newest iterator's token rather than the iterator: so `__del__` runs
        # as soon as the loop lets go of it.
        self._token = token
        self._has_ended = False

    def __next__(self) -> Any:
        # A loop ends in two ways: after the last batch of an epoch whose length is known
        # (`_has_ended`), or with a call that finds no batch left.
        if not self._stream._is_held_by(self._token):
            raise ClosedError(
                "this iterator is closed, because a newer iter(dataset) has taken over the "
                "stream. Use the newest iterator, or one JESTDataset for each loop."
            )
        if self._has_ended:
            self._stream._rest()
            raise StopIteration
        try:
            batch, self._has_ended = self._stream._next()
        except StopIteration as error:  # would end the training loop in silence
            raise UserCodeError(
                "a transform, a score or a model raised StopIteration, which would have ended the "
                "training loop in silence. Catch it there."
            ) from error
        if batch is None:
            self._stream._rest()
            raise StopIteration
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns `JESTDataset.state_dict()`."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the place where `state_dict()` was taken; ends with that epoch."""
        self._stream.load_state_dict(state)
        self._has_ended = False

    def close(self) -> None:
        """Stops worker processes and closes files, unless a newer iterator uses them."""
        if self._stream._is_held_by(self._token):
            self._stream._pause()

    def __del__(self) -> None:
        if not self._has_ended:  # a complete epoch leaves the workers to the next one
            self.close()
