"""Pickles lie in every kind of file that can hold one; the dataset here decodes all examples.

A pickle that is opened creates a file, the canary.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jest_stream import SelectionConfig
from support.models import tiny_dataset


class Payload:
    """Creates the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def array_of(payload: Payload) -> Any:
    """An array that holds it."""
    array = np.empty(1, dtype=object)
    array[0] = payload
    return array


WRITERS: dict[str, Callable[[Payload, io.BytesIO], Any]] = {
    "pkl": pickle.dump,
    "pickle": pickle.dump,
    "pyd": pickle.dump,
    "pth": torch.save,
    "pt": torch.save,
    "npy": lambda payload, stream: np.save(stream, array_of(payload), allow_pickle=True),
    "npz": lambda payload, stream: np.savez(stream, array_of(payload)),
}


def pickled(canary: Path, kind: str) -> bytes:
    """Returns the bytes of a file of this kind."""
    stream = io.BytesIO()
    WRITERS[kind](Payload(canary), stream)
    return stream.getvalue()


jest = partial(
    tiny_dataset,
    batch_size=2,
    super_batch_size=None,
    selection=SelectionConfig(method="uniform"),
    repeat=False,
)
"""Uniform batches of 2, one pass."""
