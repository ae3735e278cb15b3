"""Derives seeds from names: the same name gives the same draws in every process.

`derive_seed("shards", seed, lane, epoch)` gives the same number on every machine. The user's global
random state is neither read nor moved, except inside `isolated_rng`, which puts it back.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.random  # lazy in numpy 2: every forked worker would import it anew
import torch


def derive_seed(*parts: str | int) -> int:
    """Returns a seed in [0, 2^63) that depends on every part and on nothing else."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def permutation(length: int, *parts: str | int) -> list[int]:
    """Returns a shuffled `range(length)` that depends on `parts` alone."""
    generator = torch.Generator().manual_seed(derive_seed(*parts))
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order


@contextmanager
def isolated_rng(*parts: str | int) -> Iterator[None]:
    """Runs user code on random state seeded by `parts`, then restores the caller's.

    User transforms draw from the global generators of torch, numpy and random. Seeding them by
    name makes a resumed run repeat the draws; restoring keeps the training loop's sequence as it
    would be without this package. CPU generators only: no CUDA context is made.
    """
    saved = (torch.get_rng_state(), random.getstate(), np.random.get_state())
    seed_globally(*parts)
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        random.setstate(saved[1])
        np.random.set_state(saved[2])


def seed_globally(*parts: str | int) -> None:
    """Seeds the global generators by `parts`. Only inside `isolated_rng`.

    For user code that runs once per example: 10 us, where `isolated_rng` takes 150.
    """
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
