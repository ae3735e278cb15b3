"""This benchmark counts the FLOPs of a JEST step as it runs, beside the formula; bf16 is timed.

    python tests/benchmarks/bench_flops.py                        # ViT-S-16-alt, f = 0.8
    python tests/benchmarks/bench_flops.py --model ViT-B-16

Counts are the same on every machine and in every run. The formula is `cost_ratio`, from FLOPs of
both towers counted by hand. A cached reference costs no pass; its part of the selection counts.
bf16 leaves FLOPs alone, so its time is measured: medians of paired passes of the learner copy.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path

import open_clip
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.vit_flops import Shape, counted, pairs_for, settings, stacked  # noqa: E402

from jest_stream import ScoringConfig  # noqa: E402
from jest_stream.scoring.learner import LearnerCopy  # noqa: E402


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # that the weights are random, for every model

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = open_clip.create_model(options.model)
        return model.eval()

    shape = Shape.of(build(0))
    num_candidates = round(options.batch_size / (1 - options.filter_ratio))
    print(
        f"{options.model}, B = {num_candidates}, b = {options.batch_size}, torch "
        f"{torch.__version__}, open_clip {open_clip.__version__}"
    )
    print(f"\n| {'setting':34} | scoring, forwards | counted | formula | difference |")
    print(f"| {'-' * 34} | ----------------: | ------: | ------: | ---------: |")
    worst = 0.0
    for setting in settings(shape):
        found, _ = counted(
            setting, build, super_batch_size=num_candidates, batch_size=options.batch_size
        )
        expected = setting.expected(shape, options.filter_ratio)
        difference = found / expected - 1
        worst = max(worst, abs(difference))
        cost = shape.ratio(setting.scoring)
        print(
            f"| {setting.name:34} | {cost:17.3f} | {found:7.3f} | {expected:7.3f} | "
            f"{difference:+10.2%} |",
            flush=True,
        )
    print(f"\nlargest difference: {worst:.2%} (to be within 2 %)")
    time_bf16(build(0), shape, num_candidates, options.rounds)
    if worst > 0.02:
        raise SystemExit(1)


def time_bf16(model: nn.Module, shape: Shape, num_candidates: int, rounds: int) -> None:
    """Prints the time of a scoring pass in float32 and under bfloat16, at two view sizes."""
    images, texts = stacked(pairs_for(shape, num_candidates))
    for side in (shape.image_size, shape.image_size // 2):
        scoring = ScoringConfig(image_size=side)
        learner_copy = LearnerCopy(model, refresh_every=1, scoring=scoring)
        seconds: dict[torch.dtype | None, list[float]] = {None: [], torch.bfloat16: []}
        for _ in range(rounds + 1):  # the first warms up
            for dtype, times in seconds.items():
                start = time.perf_counter()
                learner_copy.embed(images[..., :side, :side], texts, autocast_dtype=dtype)
                times.append(time.perf_counter() - start)
        full, half = (statistics.median(times[1:]) for times in seconds.values())
        print(
            f"scoring pass at {side} px, {torch.get_num_threads()} threads: float32 {full:.3f} s, "
            f"bf16 {half:.3f} s, {full / half:.2f} times as fast"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-S-16-alt", help="of open_clip, with its own tower")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--filter-ratio", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
