"""Trains the demo's reference, the model that says which pairs can be learned.

    python build_icons.py --npm node_modules --curated curated.parquet
    python train_reference.py --data curated.parquet --out reference.safetensors     # 1 minute

It learns from four sets of emoji in colour, at half resolution, so that scoring costs a quarter.
None of the demo's test sets is among them; the pool holds many of the same emoji, as a curated
subset of a pool does.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from jest_stream.demo.data import Pairs, evaluation_sets, read_pairs
from jest_stream.demo.model import TwoTowerModel
from jest_stream.demo.training import LEARNING_RATE, make_optimizer, mean_recall, recall

BATCH_SIZE = 256
MAX_SHIFT = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="Parquet file of curated pairs")
    parser.add_argument("--out", required=True, type=Path, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from safetensors.torch import save_file

    pairs = read_pairs(args.data)
    print(f"{len(pairs.images)} pairs")
    model = train_reference(pairs, steps=args.steps, seed=args.seed)
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, args.out)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {accuracy(model)}")


def train_reference(pairs: Pairs, *, steps: int, seed: int) -> TwoTowerModel:
    """Returns a model trained with a warm-up and a cosine decay."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = TwoTowerModel()
    optimizer = make_optimizer(model)
    for step in range(steps):
        progress = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 100) * progress
        rows = torch.randint(len(pairs.images), (BATCH_SIZE,), generator=generator)
        images = half_size(shifted(pairs.images[rows], generator))
        loss = model(images, pairs.tokens[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.2f}, {accuracy(model)}", flush=True)
    return model


def accuracy(model: TwoTowerModel) -> str:
    """Returns the zero-shot accuracy on the demo's held-out sets, as a line of text."""
    sets = {
        name: Pairs(half_size(pairs.images), pairs.tokens)
        for name, pairs in evaluation_sets().items()
    }
    (_, target), *others = ((name, recall(model, pairs)) for name, pairs in sets.items())
    mean = mean_recall(value for _, value in others)
    return (
        f"R@1 / R@5: emoji {target.at_1:.1f} / {target.at_5:.1f} %, "
        f"others {mean.at_1:.1f} / {mean.at_5:.1f} %"
    )


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns `[n, 3, 32, 32]` images, each moved by up to two pixels."""
    padded = F.pad(images.float(), (MAX_SHIFT,) * 4, mode="replicate")
    moves = torch.randint(2 * MAX_SHIFT + 1, (len(images), 2), generator=generator).tolist()
    rows = zip(padded, moves, strict=True)
    return torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in rows])


def half_size(images: Tensor) -> Tensor:
    """Returns `[n, 3, 16, 16]` images, as the demo's score view makes them."""
    return F.avg_pool2d(images.float(), 2).round().to(torch.uint8)


if __name__ == "__main__":
    main()
