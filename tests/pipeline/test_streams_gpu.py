"""Scoring beside training keeps the rules that only a real GPU can break.

    pytest -m gpu tests/pipeline/test_streams_gpu.py

Skipped without CUDA; `test_streams.py` runs the same schedule on a model of a device.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu_streams import NUM_EXAMPLES, Towers, dataset_of, descend
from torch import Tensor, nn

from jest_stream.errors import NonFiniteError, ScoringMemoryError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none is here"),
]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "gpu_streams.py"
CUDA = torch.device("cuda", 0)
SLEEP = 20_000_000  # cycles: about ten milliseconds


@pytest.fixture(autouse=True)
def nothing_is_pending() -> Iterator[None]:
    yield
    torch.cuda.synchronize()


def expected_of(batch: dict[str, Any]) -> Tensor:
    """Returns the numbers of a batch's examples, by their keys, on the device."""
    numbers = torch.tensor([float(key) for key in batch["key"]], pin_memory=True)
    return numbers.to(CUDA, non_blocking=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_batches_hold_what_they_should_under_use_in_place_and_memory_pressure(
    lookahead: int,
) -> None:
    learner = Towers(seed=1).to(CUDA)
    wrong = torch.zeros((), dtype=torch.int64, device=CUDA)
    sizes = torch.Generator().manual_seed(0)
    with dataset_of(learner, lookahead=lookahead, batch_size=16, super_batch_size=32) as dataset:
        for batch in islice(dataset, 10_000 // (lookahead + 1)):
            numbers = expected_of(batch)
            wrong += (batch["image"] != numbers[:, None, None, None]).sum()
            wrong += (batch["text"][:, 0] != numbers.long()).sum()
            temporary = batch["image"].float() / 255
            batch["image"] *= 2
            size = int(torch.randint(1, 1 << 20, (), generator=sizes))
            torch.full((size,), torch.nan, device=CUDA)  # takes what is free, and goes at once
            descend(learner, temporary, batch["text"])
            wrong += (batch["image"] != 2 * numbers[:, None, None, None]).sum()
            del batch, temporary
    assert int(wrong) == 0


@pytest.mark.timeout(600)
def test_the_sanitizer_finds_no_race() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "TORCH_CUDA_SANITIZER": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("done")
    assert "CSAN" not in done.stderr and "possible data race" not in done.stderr, done.stderr


class Notes:
    """The notes that copies of a learner take on the device; shared by all of them."""

    def __init__(self) -> None:
        self.steps = torch.full((200,), -1.0, device=CUDA)
        self.torn = torch.zeros((), dtype=torch.int64, device=CUDA)
        self.num_scored = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Notes:
        return self


class Stamped(Towers):
    """A learner whose every weight tells the step number."""

    def __init__(self) -> None:
        super().__init__(seed=1, width=512)
        self.notes = Notes()

    def mark(self, step: int) -> None:
        """Fills all weights, one kernel each, as an optimizer's step would."""
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.fill_(step / 128)  # exact, and small enough to be exponentiated

    def encode_image(self, image: Tensor) -> Tensor:
        if not self.training:
            notes = self.notes
            stamp = self.logit_scale.detach()
            torch.cuda._sleep(SLEEP // 20)
            for tensor in self.parameters():
                notes.torn += (tensor != stamp).any()
            torch.cuda._sleep(SLEEP // 20)
            notes.torn += self.logit_scale.detach() != stamp
            notes.steps[notes.num_scored] = 128 * stamp
            notes.num_scored += 1
        return image.flatten(1)[:, :8] + 1

    def encode_text(self, text: Tensor) -> Tensor:
        return text.float().repeat(1, 2) + 1


@pytest.mark.parametrize(
    ("lookahead", "refresh_every", "weights"),
    [
        (0, 1, list(range(40))),
        (1, 1, [0, 0, *range(1, 40)]),
        (2, 1, [0, 0, 0, *range(1, 40)]),
        (1, 3, [0, *(3 * (step // 3) for step in range(40))]),
        (2, 3, [0, 0, *(3 * (step // 3) for step in range(40))]),
    ],
)
def test_the_copy_is_never_torn_and_as_old_as_promised(
    lookahead: int, refresh_every: int, weights: list[int]
) -> None:
    learner = Stamped().to(CUDA)
    learner.mark(0)
    options = {"lookahead": lookahead, "refresh_every": refresh_every}
    with dataset_of(learner, reference=Towers(seed=2).to(CUDA), **options) as dataset:
        for step, _ in enumerate(islice(dataset, 40)):
            torch.cuda._sleep(SLEEP // 10)
            learner.mark(step + 1)
    notes = learner.notes
    assert int(notes.torn) == 0
    assert notes.steps[: notes.num_scored].tolist() == weights[: notes.num_scored]
    assert notes.num_scored == 40 + lookahead


@pytest.mark.timeout(600)
def test_compiled_training_with_reduced_overhead_goes_on_beside_scoring() -> None:
    learner = Towers(seed=1).to(CUDA)
    compiled = torch.compile(learner, mode="reduce-overhead")
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)
    losses = []
    with dataset_of(learner, lookahead=1) as dataset:
        for batch in islice(dataset, 20):
            torch.compiler.cudagraph_mark_step_begin()
            loss = compiled(batch["image"], batch["text"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().clone())
    assert torch.stack(losses).isfinite().all()


def test_a_training_step_can_be_captured_and_replayed_beside_scoring() -> None:
    learner = Towers(seed=1).to(CUDA)
    with dataset_of(learner, lookahead=1) as dataset:
        iterator = iter(dataset)
        batch = next(iterator)
        image, text = batch["image"].clone(), batch["text"].clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                descend(learner, image, text)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # "global": a call by any other thread would end it
            descend(learner, image, text)
        before = learner.visual[1].weight.detach().clone()
        for batch in islice(iterator, 10):
            image.copy_(batch["image"])
            text.copy_(batch["text"])
            graph.replay()
        assert not torch.equal(before, learner.visual[1].weight)
        assert all(parameter.isfinite().all() for parameter in learner.parameters())


def test_batches_take_part_in_autograd_whatever_the_callers_mode() -> None:
    learner = Towers(seed=1).to(CUDA)
    with dataset_of(learner) as dataset:
        iterator = iter(dataset)
        with torch.inference_mode():
            next(iterator)
            batch = next(iterator)
        image = batch["image"]
        assert not image.is_inference() and not image.requires_grad
        image.requires_grad_()
        (learner(image, batch["text"]) * batch["weight"].mean()).backward()
        assert image.grad is not None and image.grad.isfinite().all()


def test_modes_device_and_stream_of_the_caller_are_left_alone_and_do_not_matter() -> None:
    def keys_of(num_batches: int) -> list[list[str]]:
        with dataset_of(Towers(seed=1).to(CUDA)) as dataset:
            return [batch["key"] for batch in islice(dataset, num_batches)]

    expected = keys_of(4)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(keys_of(4)))  # modes are by thread
    thread.start()
    thread.join()
    assert found == [expected]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.autocast("cuda", dtype=torch.bfloat16), torch.no_grad():
        assert keys_of(4) == expected
        assert torch.cuda.current_stream() == stream
        assert torch.cuda.current_device() == CUDA.index
        assert torch.is_autocast_enabled("cuda") and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_memory_is_taken_once() -> None:
    learner = Towers(seed=1).to(CUDA)
    with dataset_of(learner, lookahead=2) as dataset:
        iterator = iter(dataset)
        held = []
        for step in range(120):
            batch = next(iterator)
            descend(learner, batch["image"], batch["text"])
            if step in (20, 119):
                stats = torch.cuda.memory_stats()
                held.append((stats["reserved_bytes.all.peak"], stats["segment.all.allocated"]))
    assert held[0] == held[1]


class Greedy(Towers):
    """A learner whose scoring has room for fewer rows than `most`."""

    most: float = 1000
    sizes: list[int] = []

    def encode_image(self, image: Tensor) -> Tensor:
        if not self.training and self.most < 1000:
            self.sizes.append(len(image))
            unit = torch.cuda.get_device_properties(CUDA).total_memory / self.most
            torch.empty(int(len(image) * unit), dtype=torch.uint8, device=image.device)
        return super().encode_image(image)


def test_scoring_that_runs_out_of_memory_goes_on_in_smaller_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Greedy, "most", 8)
    monkeypatch.setattr(Greedy, "sizes", [])
    learner = Greedy(seed=1).to(CUDA)
    try:
        with dataset_of(learner, lookahead=1) as dataset:
            for batch in islice(dataset, 4):
                descend(learner, batch["image"], batch["text"])
            smallest = min(Greedy.sizes)
            assert smallest in (1, 2, 4)
            assert Greedy.sizes[-256 // smallest :] == [smallest] * (256 // smallest)
            monkeypatch.setattr(Greedy, "most", 1 / 2)
            iterator = iter(dataset)
            with pytest.raises(ScoringMemoryError, match="one candidate at a time"):
                for _ in range(3):
                    batch = next(iterator)
            descend(learner, batch["image"], batch["text"])  # training is not harmed
            monkeypatch.setattr(Greedy, "most", 1000)
            next(iter(dataset))
    finally:
        torch.cuda.empty_cache()


def test_no_step_waits_for_the_device() -> None:
    learner = Towers(seed=1).to(CUDA)
    with dataset_of(learner, lookahead=1) as dataset:
        iterator = iter(dataset)
        for _ in range(3):
            batch = next(iterator)
            descend(learner, batch["image"], batch["text"])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                batch = next(iterator)
                descend(learner, batch["image"], batch["text"])
            dataset.metrics()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_scoring_runs_while_the_training_stream_is_busy() -> None:
    """Kernels that do nothing but take time: side by side they take it once."""
    seconds = {}
    for lookahead in (0, 1):
        learner = Towers(seed=1).to(CUDA)
        learner.sleeps = 5 * SLEEP
        with dataset_of(learner, lookahead=lookahead) as dataset:
            iterator = iter(dataset)
            for _ in range(3):
                next(iterator)
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(10):
                next(iterator)
                torch.cuda._sleep(5 * SLEEP)
            torch.cuda.synchronize()
            seconds[lookahead] = time.perf_counter() - begun
            assert dataset.metrics()["scoring_device_s"] > 0
    assert seconds[1] < 0.75 * seconds[0], seconds


def test_scores_that_are_not_finite_are_told_before_the_batch_is_handed_out() -> None:
    learner = Towers(seed=1).to(CUDA)
    with dataset_of(learner, lookahead=1) as dataset:
        iterator = iter(dataset)
        next(iterator)
        with torch.no_grad():
            learner.visual[1].weight.fill_(torch.nan)
        next(iterator)  # was chosen before
        with pytest.raises(NonFiniteError, match="for step 2"):
            next(iterator)


def devices() -> list[tuple[str, str]]:
    pairs = [("cuda:0", "cpu"), ("cpu", "cuda:0")]
    if torch.cuda.device_count() > 1:
        pairs += [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")]
    return pairs


@pytest.mark.parametrize(("training", "scoring"), devices())
def test_scoring_may_run_elsewhere(training: str, scoring: str) -> None:
    learner: nn.Module = Towers(seed=1).to(training)
    options = {"scoring_device": scoring, "batch_size": 16, "super_batch_size": 32}
    with dataset_of(learner, lookahead=1, **options) as dataset:
        for batch in islice(dataset, 200):
            assert batch["image"].device == batch["weight"].device == torch.device(training)
            numbers = torch.tensor([float(key) for key in batch["key"]], device=training)
            assert (batch["image"] == numbers[:, None, None, None]).all()
            assert (batch["text"][:, 0] == numbers.long()).all()
            batch["image"] /= NUM_EXAMPLES
            descend(learner, batch["image"], batch["text"])


def test_resuming_gives_the_same_batches_on_the_gpu() -> None:
    def keys_from(state: Any, learner: Towers, num_batches: int) -> tuple[list[Any], Any]:
        with dataset_of(learner, lookahead=2) as dataset:
            if state is not None:
                dataset.load_state_dict(state)
            keys = [batch["key"] for batch in islice(dataset, num_batches)]
            return keys, dataset.state_dict(include_learner_copy=True)

    learner = Towers(seed=1).to(CUDA)
    whole, _ = keys_from(None, learner, 8)
    head, state = keys_from(None, learner, 3)
    tail, _ = keys_from(state, learner, 5)
    assert head + tail == whole
