"""Scoring beside training is timed on a GPU: steps with it, without it, and without scoring.

    python tests/benchmarks/bench_overlap.py                       # needs CUDA
    python tests/benchmarks/bench_overlap.py --model ViT-B-16 --batch-size 128

Trains an open_clip model with random weights (AdamW, bfloat16 autocast) on pictures that lie ready
in memory, with a live reference of the same size scored in bfloat16. In turn, per round: plain
training on one batch; JEST with `lookahead=0`, where every step waits for its own scoring; JEST
with `lookahead=1` and 2, where super-batches are scored beside training. Prints the median step
time, what of it the device spent on scoring and selecting, and what the host spent on data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from bench_selection import machine  # noqa: E402

from jest_stream import JESTDataset, ScoringConfig  # noqa: E402

NUM_PICTURES = 512


class Pictures:
    """An endless stream of a few uint8 pictures: reading them costs next to nothing."""

    def __init__(self, size: int, context_length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_PICTURES, 3, size, size)
        self._images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self._texts = torch.randint(1, 1000, (NUM_PICTURES, context_length), generator=generator)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(1 << 40):
            row = number % NUM_PICTURES
            yield {"__key__": str(number), "image": self._images[row], "text": self._texts[row]}


class FromBytes(nn.Module):
    """An open_clip model that takes pixels as bytes, made floating on the device."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import open_clip

        self.model = open_clip.create_model(name, init_logit_bias=-10.0)
        self.size: int = self.model.visual.image_size[0]
        self.context_length: int = self.model.context_length

    @property
    def logit_scale(self) -> Tensor:
        scale: Tensor = self.model.logit_scale
        return scale

    @property
    def logit_bias(self) -> Tensor:
        bias: Tensor = self.model.logit_bias
        return bias

    def encode_image(self, image: Tensor) -> Tensor:
        return self.model.encode_image(image.float() / 127.5 - 1)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.model.encode_text(text)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Returns the sigmoid loss of a batch."""
        images = F.normalize(self.encode_image(image), dim=-1)
        texts = F.normalize(self.encode_text(text), dim=-1)
        logits = self.logit_scale.exp() * images @ texts.T + self.logit_bias
        labels = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(labels * logits).sum() / len(logits)


def trainer(learner: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Returns a training step."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-4, fused=True)

    def step(image: Tensor, text: Tensor) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = learner(image, text)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def seconds_per_step(
    batches: Iterator[Any], step: Callable[[Tensor, Tensor], None], n: int
) -> float:
    """Returns the mean over `n` steps, from an idle device to an idle device."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for image, text in islice(batches, n):
        step(image, text)
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / n


def measure(
    options: argparse.Namespace, lookahead: int | None
) -> tuple[float, dict[str, float | int]]:
    """Returns seconds per step, and the metrics of those steps; of plain training for None."""
    torch.manual_seed(0)
    learner, reference = FromBytes(options.model).cuda(), FromBytes(options.model).cuda()
    step = trainer(learner)
    pictures = Pictures(learner.size, learner.context_length)
    if lookahead is None:
        rows = list(islice(pictures, options.batch_size))
        image, text = (torch.stack([row[k] for row in rows]).cuda() for k in ("image", "text"))
        plain = iter(lambda: (image, text), None)
        seconds_per_step(plain, step, options.warm_up)
        return seconds_per_step(plain, step, options.steps), {}
    with JESTDataset(
        pictures,
        learner=learner,
        reference=reference,
        batch_size=options.batch_size,
        filter_ratio=options.filter_ratio,
        lookahead=lookahead,
        scoring=ScoringConfig(autocast_dtype=torch.bfloat16),
    ) as dataset:
        batches = iter(dataset)
        seconds_per_step(batches, step, options.warm_up)
        before = dataset.metrics()
        seconds = seconds_per_step(batches, step, options.steps)
        after = dataset.metrics()
    names = ("scoring_device_s", "selecting_device_s", "data_s", "yielding_s")
    return seconds, {name: (after[name] - before[name]) / options.steps for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--filter-ratio", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_overlap.py needs a CUDA device, and this machine has none: not measured.")
    kinds = {"plain": None, "lookahead=0": 0, "lookahead=1": 1, "lookahead=2": 2}
    found: dict[str, list[tuple[float, dict[str, float | int]]]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind, lookahead in kinds.items():
            found[kind].append(measure(options, lookahead))
    print(f"{torch.cuda.get_device_name()}, {machine()}, {options.model}, b={options.batch_size}, ")
    print(
        f"f={options.filter_ratio}, medians of {options.rounds} rounds of {options.steps} steps\n"
    )
    print(
        "| | ms per step | relative | scoring, device ms | selecting, device ms | data, host ms |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    plain = statistics.median(seconds for seconds, _ in found["plain"])
    for kind, rounds in found.items():
        seconds = statistics.median(seconds for seconds, _ in rounds)
        shown = [f"{1000 * seconds:.1f}", f"{seconds / plain:.2f}"]
        for name in ("scoring_device_s", "selecting_device_s", "data_s"):
            values = [metrics[name] for _, metrics in rounds if name in metrics]
            shown.append(f"{1000 * statistics.median(values):.1f}" if values else "")
        print(f"| {kind} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
