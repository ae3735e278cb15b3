"""Trains and tests the demo's model as a user's own code would, the same with and without JEST.

The test is zero-shot retrieval: among all pictures of a set that no model has trained on, the one
that belongs to a caption must be found, and the other way round.

Shapes: n: pairs of a set, D: embedding dimension.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jest_stream.demo.data import TARGET, Pairs
from jest_stream.demo.model import TwoTowerModel

LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Recall:
    """Shares of pairs whose partner is the best match, or among the best five. In percent."""

    at_1: float
    at_5: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """Time and accuracy of a run after some steps."""

    step: int
    seconds: float
    """Spent on reading, selecting and training so far; testing is not counted."""
    target: Recall
    """On the held-out set of the reference's domain."""
    others: Recall
    """Mean over the held-out sets of other domains."""


def make_optimizer(model: TwoTowerModel) -> torch.optim.Optimizer:
    """Returns the AdamW of both runs and of the reference."""
    return torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )


def train(
    model: TwoTowerModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    sets: Mapping[str, Pairs],
    *,
    steps: int,
    test_every: int,
) -> Iterator[tuple[int, Point | None]]:
    """Trains `model`; yields each step's number, and a point where there was a test.

    The untrained model is tested as step 0, and the last step in any case.

    Args:
      model: trained in place, on the device of its parameters.
      batches: images and tokens on that device, at least `steps` times.
      sets: held-out pairs to test on.
      steps: optimizer steps.
      test_every: steps between tests.
    """
    optimizer = make_optimizer(model)
    yield 0, _point(model, sets, step=0, seconds=0.0)
    seconds, started = 0.0, time.perf_counter()
    stream = iter(batches)
    for step in range(1, steps + 1):
        images, tokens = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS)
        loss = model.train()(images, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % test_every and step < steps:
            yield step, None
            continue
        loss.item()  # on a GPU this waits for the work that is being timed
        seconds += time.perf_counter() - started
        yield step, _point(model, sets, step=step, seconds=seconds)
        started = time.perf_counter()


def recall(model: TwoTowerModel, pairs: Pairs, micro_batch_size: int = 512) -> Recall:
    """Returns the mean of image-to-text and text-to-image recall within one set."""
    device = model.logit_scale.device
    model.eval()
    images, texts = [], []
    with torch.no_grad():
        for start in range(0, len(pairs.images), micro_batch_size):
            rows = slice(start, start + micro_batch_size)
            images.append(model.encode_image(pairs.images[rows].to(device)))
            texts.append(model.encode_text(pairs.tokens[rows].to(device)))
    logits = F.normalize(torch.cat(images), dim=-1) @ F.normalize(torch.cat(texts), dim=-1).T
    # The rank of a caption is the number of captions that match its picture better: 0 is the best.
    # Both directions, from the rows and from the columns of one matrix.
    right = logits.diagonal()
    ranks = torch.cat([(logits > right[:, None]).sum(1), (logits > right).sum(0)])  # [2 n]
    return Recall(*(100 * (ranks < k).float().mean().item() for k in (1, 5)))


def mean_recall(recalls: Iterable[Recall]) -> Recall:
    """Returns the mean over sets, each counted once."""
    listed = list(recalls)
    return Recall(
        sum(found.at_1 for found in listed) / len(listed),
        sum(found.at_5 for found in listed) / len(listed),
    )


def _point(model: TwoTowerModel, sets: Mapping[str, Pairs], *, step: int, seconds: float) -> Point:
    found = {name: recall(model, pairs) for name, pairs in sets.items()}
    others = mean_recall(value for name, value in found.items() if name != TARGET)
    return Point(step=step, seconds=seconds, target=found[TARGET], others=others)
