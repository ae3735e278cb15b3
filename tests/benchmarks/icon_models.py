"""The benchmarks of choices run on embeddings of real models in training, on real pairs.

Trains the demo's model on the demo's icons at 16 px: a reference to the end, and a learner of
another seed that is caught on the way. Four minutes on one core.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from jest_stream.demo.model import HashTokenizer, TwoTowerModel  # noqa: E402
from jest_stream.types import Embeddings  # noqa: E402

ICONS = ROOT / "jest_stream" / "demo" / "assets" / "icons.parquet"
LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
BATCH_SIZE = 256


def icons(num_pairs: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Returns images `[n, 3, 16, 16]` and tokens `[n, L]` of pairs of the pool, drawn at random."""
    table = pyarrow.parquet.read_table(ICONS, filters=[("role", "==", "pool")])
    order = torch.randperm(table.num_rows, generator=torch.Generator().manual_seed(seed))
    rows = table.take(order[:num_pairs].numpy()).to_pylist()
    images = [Image.open(io.BytesIO(row["image"])).convert("RGB").reduce(2) for row in rows]
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).contiguous(), HashTokenizer()([row["text"] for row in rows])


def training(
    pairs: tuple[Tensor, Tensor], *, num_steps: int, decays: bool, seed: int
) -> Iterator[tuple[int, TwoTowerModel]]:
    """Yields the model after each step on a uniform batch; the rate may decay to 0 by a cosine."""
    torch.manual_seed(seed)
    model = TwoTowerModel()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1
    )
    for step in range(1, num_steps + 1):
        decay = (1 + math.cos(math.pi * step / num_steps)) / 2 if decays else 1.0
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS) * decay
        rows = torch.randint(len(pairs[0]), (BATCH_SIZE,))
        loss = model.train()(pairs[0][rows], pairs[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"seed {seed}, step {step}: loss {loss.item():.3f}", file=sys.stderr)
        yield step, model.eval()


@torch.no_grad()
def embed(model: TwoTowerModel, pairs: tuple[Tensor, Tensor]) -> Embeddings:
    """Returns what the model makes of the pairs: `[n, D]` each, unit norm."""
    blocks = list(zip(*(column.split(512) for column in pairs), strict=True))
    return Embeddings(
        image=normalize(torch.cat([model.encode_image(images) for images, _ in blocks]), dim=1),
        text=normalize(torch.cat([model.encode_text(tokens) for _, tokens in blocks]), dim=1),
        logit_scale=float(model.logit_scale.exp()),
        logit_bias=float(model.logit_bias),
    )


def models_in_training(
    num_candidates: int,
    *,
    learner_steps: Sequence[int],
    reference_steps: int,
    reference_knows_candidates: bool = False,
) -> tuple[dict[int, Embeddings], Embeddings]:
    """Returns embeddings of the same candidates: the learner's after some steps, the reference's.

    The candidates are in nobody's training set, or in the reference's only.
    """
    images, tokens = icons(20_000 + num_candidates, seed=0)
    candidates = images[:num_candidates], tokens[:num_candidates]
    pairs = images[num_candidates:], tokens[num_candidates:]
    known = (images, tokens) if reference_knows_candidates else pairs
    *_, (_, reference) = training(known, num_steps=reference_steps, decays=True, seed=1)
    learners = {
        step: embed(learner, candidates)
        for step, learner in training(pairs, num_steps=max(learner_steps), decays=False, seed=2)
        if step in learner_steps
    }
    return learners, embed(reference, candidates)
