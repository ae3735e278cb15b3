"""Scenarios run the whole dataset beside training: plain ones, and some awkward for streams.

Each scenario takes shards and a `QueuedDevice`, or None for the CPU, and returns what the batches
held. The result must be the same on both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import Tensor
from torchvision import transforms

from jest_stream import JESTDataset, ReferenceCache
from support.models import (
    SIZE,
    TinyTwoTower,
    flipped,
    tiny_dataset,
    to_tensor,
    tokenize,
    train_step,
)
from support.queued_device import QueuedDevice


class Learner(TinyTwoTower):
    """A learner whose copies are made by ops, which the device sees; told when to fail."""

    failures = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Learner:
        copied = type(self)()
        copied.load_state_dict(self.state_dict())
        return copied

    def encode_text(self, text: Tensor) -> Tensor:
        if Learner.failures and not self.training:
            Learner.failures -= 1
            raise ValueError("as it was told")
        return super().encode_text(text)


def dataset_of(shards: list[str], learner: TinyTwoTower, **options: Any) -> JESTDataset:
    reference = TinyTwoTower(seed=2)
    if isinstance(options.get("device_model"), QueuedDevice):
        options.pop("device_model").put(learner, reference)
    options.pop("device_model", None)
    return tiny_dataset(shards, learner=learner, **{"reference": reference, **options})


def take(dataset: JESTDataset, learner: TinyTwoTower, num_steps: int) -> list[dict[str, Any]]:
    """Trains on batches; returns what they held."""
    held = []
    for batch in islice(dataset, num_steps):
        tensors = {name: batch[name].clone() for name in ("image", "text", "weight")}
        held.append({"key": batch["key"], **tensors})
        train_step(learner, (batch["image"], batch["text"]))
        batch["image"] /= 255  # in place, as training loops do
        learner.logit_scale.detach().add_(0 * batch["weight"].sum())
        del batch  # its memory is free while the device may still be at work on it
    return held


@contextmanager
def watched(device: QueuedDevice | None) -> Iterator[None]:
    if device is None:
        yield
    else:
        with device.watched():
            yield


Scenario = Callable[[list[str], "QueuedDevice | None"], list[dict[str, Any]]]


def scenario_of(**options: Any) -> Scenario:
    """A run of ten steps."""

    def run(shards: list[str], device: QueuedDevice | None) -> list[dict[str, Any]]:
        learner = Learner(seed=1)
        with dataset_of(shards, learner, device_model=device, **options) as dataset:
            with watched(device):
                return take(dataset, learner, 10)

    return run


def broken_off(shards: list[str], device: QueuedDevice | None) -> list[dict[str, Any]]:
    """A pass that is broken off with super-batches in flight, and the next one."""
    learner = Learner(seed=1)
    options = {"lookahead": 2, "repeat": False, "device_model": device}
    with dataset_of(shards, learner, **options) as dataset, watched(device):
        return [*take(dataset, learner, 2), *take(dataset, learner, 5)]


def resumed(shards: list[str], device: QueuedDevice | None) -> list[dict[str, Any]]:
    """A checkpoint with super-batches in flight, loaded twice where others were in flight."""
    learner = Learner(seed=1)
    with dataset_of(shards, learner, lookahead=2, device_model=device) as dataset:
        with watched(device):
            held = take(dataset, learner, 3)
            state = dataset.state_dict(include_learner_copy=True)
            for _ in range(2):
                held += take(dataset, learner, 3)
                dataset.load_state_dict(state)
            return [*held, *take(dataset, learner, 5)]


def closed_in_the_middle(shards: list[str], device: QueuedDevice | None) -> list[dict[str, Any]]:
    """Closing with super-batches in flight; training goes on."""
    learner = Learner(seed=1)
    dataset = dataset_of(shards, learner, lookahead=2, device_model=device)
    with watched(device):
        held = take(dataset, learner, 3)
        dataset.close()
        train_step(learner, (held[0]["image"], held[0]["text"]))
    return held


def failed(shards: list[str], device: QueuedDevice | None) -> list[dict[str, Any]]:
    """Scoring that fails in the middle, again and again."""
    learner, held = Learner(seed=1), []
    with dataset_of(shards, learner, lookahead=1, device_model=device) as dataset:
        with watched(device):
            for _ in range(5):
                try:
                    held += take(dataset, learner, 2)
                    Learner.failures = 1
                    held += take(dataset, learner, 2)
                except ValueError:
                    pass
            Learner.failures = 0
    return held


def on_several_streams(shards: list[str], device: QueuedDevice | None) -> list[dict[str, Any]]:
    """A consumer that changes its stream, and refreshes by hand."""
    learner = Learner(seed=1)
    dataset = dataset_of(shards, learner, device_model=device, lookahead=1, refresh_every=100)
    with watched(device):
        held = take(dataset, learner, 3)
        if device is not None:
            ours = device.current_stream()
            theirs = device.other_stream()
            theirs.wait_event(ours.record_event())
            with device.use(theirs):
                dataset.refresh()
                held.append(next(iter(dataset)))
                dataset.refresh()
            dataset.refresh()
            dataset.refresh()
            ours.wait_event(theirs.record_event())
            held += take(dataset, learner, 2)
            theirs.wait_event(ours.record_event())
            with device.use(theirs):
                dataset.refresh()
            dataset.close()
            del dataset
            train_step(learner, (held[0]["image"], held[0]["text"]))  # takes what is free
        else:
            dataset.refresh()
            held.append(next(iter(dataset)))
            dataset.refresh()
            dataset.refresh()
            held += take(dataset, learner, 2)
            dataset.close()
    return held


def doubled(image: Any) -> Tensor:
    """A train view of twice the size of the score view."""
    return to_tensor(image).repeat(1, 2, 2)


def of_two_sizes(shards: list[str], device: QueuedDevice | None) -> list[dict[str, Any]]:
    """Batches whose one half is as it was scored, the other half made late."""
    learner, held = Learner(seed=1), []
    options = {"lookahead": 2, "train_transform": doubled, "score_view_fraction": 0.5}
    with dataset_of(shards, learner, device_model=device, **options) as dataset:
        with watched(device):
            for batch in islice(dataset, 6):
                train_step(learner, (batch["small_image"], batch["small_text"]))
                tensors = {name: v.clone() for name, v in batch.items() if isinstance(v, Tensor)}
                held.append({"key": batch["key"], **tensors})
    return held


def distilled(shards: list[str], device: QueuedDevice | None) -> list[dict[str, Any]]:
    """Batches with the embeddings of a live reference, resumed with super-batches in flight."""
    learner, held = Learner(seed=1), []

    def note(num_steps: int) -> None:
        for batch in islice(dataset, num_steps):
            reference = {name: value.clone() for name, value in batch["reference"].items()}
            held.append({"key": batch["key"], **reference})
            train_step(learner, (batch["image"], batch["text"]))
            batch["reference"]["image"].mul_(0)

    options = {"lookahead": 2, "with_reference": True, "filter_ratio": {0: 0.5, 7: 0.0}}
    with dataset_of(
        shards, learner, device_model=device, super_batch_size=None, **options
    ) as dataset:
        with watched(device):
            note(3)
            state = dataset.state_dict(include_learner_copy=True)
            note(2)
            dataset.load_state_dict(state)
            note(7)
    return held


def from_pixels(shards: list[str], device: QueuedDevice | None) -> list[dict[str, Any]]:
    """Score views that are uint8 on their way, and floats where they are used."""
    steps = [transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), transforms.Normalize(0.5, 0.2)]
    return scenario_of(transform=transforms.Compose(steps), lookahead=1)(shards, device)


def from_a_cache(shards: list[str], device: QueuedDevice | None) -> list[dict[str, Any]]:
    """A cached reference, whose embeddings batches have too."""
    with tempfile.TemporaryDirectory() as folder:
        views = {"transform": to_tensor, "tokenizer": tokenize}
        cache = ReferenceCache.build(shards, TinyTwoTower(seed=2), folder + "/cache", **views)
        learner = Learner(seed=1)
        options = {"lookahead": 1, "with_reference": True, "reference": cache}
        with dataset_of(shards, learner, device_model=device, **options) as dataset:
            with watched(device):
                batches = list(islice(dataset, 6))
                found = [{"key": each["key"], **each["reference"]} for each in batches]
        cache.close()
    return found


SCENARIOS: dict[str, Scenario] = {
    **{
        f"lookahead {lookahead}, refresh every {refresh_every}": scenario_of(
            lookahead=lookahead, refresh_every=refresh_every
        )
        for lookahead in (0, 1, 2)
        for refresh_every in (1, 3)
    },
    **{
        f"late views, lookahead {lookahead}": scenario_of(
            lookahead=lookahead, train_transform=flipped
        )
        for lookahead in (0, 1, 2)
    },
    "two sizes": of_two_sizes,
    "a schedule of sizes": scenario_of(
        super_batch_size=None, filter_ratio={0: 0.5, 3: 0.75, 6: 0.5}, lookahead=1
    ),
    "distilled": distilled,
    "from pixels": from_pixels,
    "from a cache": from_a_cache,
    "broken off": broken_off,
    "resumed": resumed,
    "closed": closed_in_the_middle,
    "failed": failed,
    "several streams": on_several_streams,
}
