"""Sub-batches chosen in half precision are compared with those in float32, under the same noise.

    python tests/benchmarks/bench_precision.py      # four minutes, most of them training

Embeddings of real models in training, rounded to half precision as a cache would store them (or as
autocast would make them), against the same in float32: the share of the sub-batch that both choose,
over 20 seeds of the noise. Products and sums are in float32 either way. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench_selection import machine  # noqa: E402
from icon_models import models_in_training  # noqa: E402

from jest_stream.selection.joint import joint_selection  # noqa: E402
from jest_stream.types import Embeddings  # noqa: E402


def rounded(model: Embeddings, dtype: torch.dtype) -> Embeddings:
    """Returns the embeddings in another precision."""
    return replace(model, image=model.image.to(dtype), text=model.text.to(dtype))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--super-batch-size", type=int, default=5120)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--learner-steps", type=int, default=300)
    parser.add_argument("--reference-steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    learners, reference = models_in_training(
        options.super_batch_size,
        learner_steps=[options.learner_steps],
        reference_steps=options.reference_steps,
    )
    learner = learners[options.learner_steps]

    def chosen(pair: tuple[Embeddings, Embeddings], step: int) -> set[int]:
        selection = joint_selection(*pair, batch_size=options.batch_size, key=0, step=step)
        return set(selection.indices.tolist())

    half, brain = torch.float16, torch.bfloat16
    rounding = {
        "reference float16": (learner, rounded(reference, half)),
        "reference bfloat16": (learner, rounded(reference, brain)),
        "both float16": (rounded(learner, half), rounded(reference, half)),
        "both bfloat16": (rounded(learner, brain), rounded(reference, brain)),
    }
    exact = [chosen((learner, reference), step) for step in range(options.seeds + 1)]
    overlaps = {
        name: [
            len(chosen(pair, step) & exact[step]) / options.batch_size
            for step in range(options.seeds)
        ]
        for name, pair in rounding.items()
    }
    overlaps["float32, different noise"] = [
        len(exact[step] & exact[step + 1]) / options.batch_size for step in range(options.seeds)
    ]
    print(
        f"B = {options.super_batch_size:,}, b = {options.batch_size:,}, 16 chunks, "
        f"{options.seeds} seeds; learner after {options.learner_steps} steps, reference after "
        f"{options.reference_steps}\n"
    )
    print("| embeddings | mean overlap with float32 | least |\n|---|---|---|")
    for name, values in overlaps.items():
        print(f"| {name} | {statistics.mean(values):.4f} | {min(values):.4f} |")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
