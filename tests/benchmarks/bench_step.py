"""A JEST step is timed beside its parts, each measured apart, and beside what its FLOPs predict.

    python tests/benchmarks/bench_step.py                            # live reference, full size
    python tests/benchmarks/bench_step.py --setting cached-quarter   # a quarter of the image tokens
    python tests/benchmarks/bench_step.py --setting all

A real open_clip ViT learns from pairs that lie in memory as tensors; time spent waiting for data is
reported apart and left out of the step. The parts are the functions that the dataset calls, called
by hand: a training step, the learner copy's pass, the reference's pass, the choice. Each round
measures all of them side by side, so that a busy machine slows them alike; every figure is a median
over rounds, a ratio the median of the rounds' ratios. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from jest_stream import JESTDataset, ScoringConfig, SelectionConfig, training_flops  # noqa: E402
from jest_stream.scoring.learner import LearnerCopy  # noqa: E402
from jest_stream.scoring.reference import ReferenceModel  # noqa: E402
from jest_stream.selection.joint import joint_selection  # noqa: E402
from jest_stream.types import Embeddings  # noqa: E402

SETTINGS = ("live", "cached", "live-quarter", "cached-quarter")
WORDS, VOCABULARY, DIMENSION, PATCH_SIZE = 16, 512, 128, 8
STEP, PLAIN, LEARNER, REFERENCE, CHOICE = (
    "JEST step",
    "plain step",
    "learner's pass",
    "reference's pass",
    "choice",
)


def vit(arguments: argparse.Namespace, *, seed: int) -> nn.Module:
    """Returns an open_clip model for the sigmoid loss."""
    import open_clip

    torch.manual_seed(seed)
    vision = {"image_size": arguments.image_size, "patch_size": PATCH_SIZE}
    vision |= {"width": arguments.width, "layers": arguments.layers, "head_width": 32}
    text = {"context_length": WORDS, "vocab_size": VOCABULARY, "width": arguments.width // 2}
    text |= {"heads": 2, "layers": arguments.layers}
    return open_clip.CLIP(DIMENSION, vision, text, init_logit_bias=-10.0)


def pairs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a few super-batches of pairs, ready to be stacked."""
    generator = torch.Generator().manual_seed(0)
    size = arguments.image_size
    return [
        {
            "__key__": f"{index:06d}",
            "image": torch.randn(3, size, size, generator=generator),
            "text": torch.randint(1, VOCABULARY, (WORDS,), generator=generator),
        }
        for index in range(4 * super_batch_size(arguments))
    ]


def super_batch_size(arguments: argparse.Namespace) -> int:
    return round(arguments.batch_size / (1 - arguments.filter_ratio))


def loss_of(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """Returns the sigmoid loss of a batch of matching pairs."""
    image = F.normalize(model.encode_image(images), dim=-1)
    text = F.normalize(model.encode_text(texts), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(logits)


class Trainer:
    """A plain training loop's body."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(self, images: Tensor, texts: Tensor) -> None:
        """Makes one step."""
        loss = loss_of(self.model, images, texts)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


class Parts:
    """The parts of a step, on one super-batch, by the functions that the dataset calls."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        trainer: Trainer,
        reference: nn.Module | None,
        scoring: ScoringConfig,
        examples: list[dict[str, Any]],
    ) -> None:
        size = super_batch_size(arguments)
        self._trainer = trainer
        self._batch_size = arguments.batch_size
        self._scoring = scoring
        self._images = torch.stack([example["image"] for example in examples[:size]])
        self._texts = torch.stack([example["text"] for example in examples[:size]])
        options = {} if arguments.tokens == 1 else {"scoring": scoring}
        self._copy = LearnerCopy(trainer.model, refresh_every=1, **options)
        self._reference: ReferenceModel | None = None
        if reference is not None:
            self._reference = ReferenceModel(reference, **options)
        self._learner_rows = self._embed(self._copy)
        self._reference_rows = (
            self._embed(self._reference)
            if self._reference is not None
            else random_embeddings(size, seed=1)
        )

    def _embed(self, model: LearnerCopy | ReferenceModel) -> Embeddings:
        images = self._images
        if getattr(self._scoring, "image_size", None) is not None:
            from jest_stream.views.scaling import scaled

            images = scaled(images, self._scoring.image_size)
        size = self._scoring.micro_batch_size
        return model.embed(images, self._texts, micro_batch_size=size)

    def functions(self) -> dict[str, Callable[[], object]]:
        """Returns what is timed, by name."""
        found: dict[str, Callable[[], object]] = {
            PLAIN: lambda: self._trainer.step(
                self._images[: self._batch_size], self._texts[: self._batch_size]
            ),
            LEARNER: lambda: self._embed(self._copy),
        }
        if self._reference is not None:
            reference = self._reference
            found[REFERENCE] = lambda: self._embed(reference)
        found[CHOICE] = lambda: joint_selection(
            self._learner_rows,
            self._reference_rows,
            batch_size=self._batch_size,
            num_chunks=min(16, self._batch_size),
            key=0,
            step=0,
        )
        return found


def random_embeddings(num_rows: int, *, seed: int) -> Embeddings:
    """Returns unit-norm rows: the time of a choice does not depend on where they come from."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (
        F.normalize(torch.randn(num_rows, DIMENSION, generator=generator), dim=1) for _ in range(2)
    )
    return Embeddings(image=image, text=text, logit_scale=14.0, logit_bias=-10.0)


@contextmanager
def reference_of(
    arguments: argparse.Namespace, reference: nn.Module, examples: list[dict[str, Any]]
) -> Iterator[Any]:
    """Yields the reference as the dataset takes it: live, or a cache of all pairs."""
    if not arguments.is_cached:
        yield reference
        return
    from jest_stream import ReferenceCache

    with tempfile.TemporaryDirectory() as folder:
        yield ReferenceCache.build(examples, reference, folder)


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Returns, per round: seconds of the step and of its parts, of data, and the FLOPs ratio."""
    examples, reference = pairs(arguments), vit(arguments, seed=1)
    trainer = Trainer(vit(arguments, seed=0))
    scoring = scoring_of(arguments)
    parts = Parts(
        arguments, trainer, None if arguments.is_cached else reference, scoring, examples
    ).functions()
    images = torch.stack([example["image"] for example in examples[:4]])
    texts = torch.stack([example["text"] for example in examples[:4]])
    flops = training_flops(trainer.model, lambda model: loss_of(model, images, texts)) / 4
    found: dict[str, list[float]] = {name: [] for name in (STEP, *parts, "data", "flops")}
    with (
        reference_of(arguments, reference, examples) as passed,
        JESTDataset(
            examples,
            learner=trainer.model,
            reference=passed,
            batch_size=arguments.batch_size,
            super_batch_size=super_batch_size(arguments),
            selection=SelectionConfig(),
            scoring=scoring,
            training_flops=flops,
        ) as dataset,
    ):
        stream = iter(dataset)
        trainer.step(*next(stream))  # makes the copy, fills the lookahead, warms up
        for function in parts.values():
            function()
        for number in range(arguments.rounds):
            before = dataset.metrics()
            begin = time.perf_counter()
            trainer.step(*next(stream))
            seconds = time.perf_counter() - begin
            after = dataset.metrics()
            change = {name: after[name] - before[name] for name in after}
            found["data"].append(change["data_s"])
            found[STEP].append(seconds - change["data_s"])
            paid = ("training", "learner_scoring", "reference_scoring", "selection")
            total = sum(change[f"flops_{name}"] for name in paid)
            found["flops"].append(total / change["flops_training"])
            for name, function in parts.items():
                begin = time.perf_counter()
                function()
                found[name].append(time.perf_counter() - begin)
            print(f"round {number + 1}/{arguments.rounds}", file=sys.stderr)
    return found


def scoring_of(arguments: argparse.Namespace) -> ScoringConfig:
    """Returns how candidates are scored: at half the size, a quarter of the tokens is left."""
    rows = arguments.micro_batch_size
    if arguments.tokens == 1:
        return ScoringConfig(micro_batch_size=rows)
    return ScoringConfig(micro_batch_size=rows, image_size=arguments.image_size // 2)


def report(name: str, found: dict[str, list[float]], arguments: argparse.Namespace) -> str:
    """Returns the medians and both ratios as Markdown."""
    parts = [part for part in (PLAIN, LEARNER, REFERENCE, CHOICE) if part in found]
    lines = [
        f"{name}: {arguments.batch_size} of {super_batch_size(arguments)}, image size "
        f"{arguments.image_size}, width {arguments.width}, {arguments.layers} layers, "
        f"{arguments.micro_batch_size} rows per pass; {arguments.rounds} rounds",
        "",
        "| | median ms |",
        "|---|---:|",
        *(f"| {part} | {1000 * statistics.median(found[part]):.1f} |" for part in (STEP, *parts)),
        f"| waiting for data, apart | {1000 * statistics.median(found['data']):.1f} |",
    ]
    sums = [sum(seconds) for seconds in zip(*(found[part] for part in parts), strict=True)]
    over_parts = median_ratio(found[STEP], sums)
    over_plain = median_ratio(found[STEP], found[PLAIN])
    predicted = statistics.median(found["flops"])
    return "\n".join(
        [
            *lines,
            "",
            f"The step takes {over_parts:.3f} times its parts (at most 1.05 wanted).",
            f"It takes {over_plain:.2f} plain steps; its FLOPs predict {predicted:.2f}: "
            f"{over_plain / predicted:.3f} times as long (at most 1.10 wanted where the reference "
            f"is cached and a quarter of the tokens is scored).",
            "",
        ]
    )


def median_ratio(numbers: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numbers, others, strict=True))


def machine() -> str:
    """Returns what the figures were measured on."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f}, "
        f"commit {commit or 'none'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=(*SETTINGS, "all"), default="live")
    parser.add_argument("--rounds", type=int, default=9, help="default 9")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--filter-ratio", type=float, default=0.8)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--micro-batch-size",
        type=int,
        default=32,
        help="rows scored per pass, default 32: on a CPU, larger ones leave its caches",
    )
    parser.add_argument("--threads", type=int, help="default: torch's")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    names = SETTINGS if arguments.setting == "all" else (arguments.setting,)
    for name in names:
        arguments.is_cached = name.startswith("cached")
        arguments.tokens = 0.25 if name.endswith("quarter") else 1
        print(report(name, measure(arguments), arguments))
    print(machine())


if __name__ == "__main__":
    main()
