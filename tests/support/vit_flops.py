"""FLOPs of a CLIP with two transformers are counted by hand; those of JEST steps as they run.

A multiply-add is two. Shared by `metrics/test_cost_formula.py` and `benchmarks/bench_flops.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jest_stream import JESTDataset, ReferenceCache, ScoringConfig, SelectionConfig, at_score_size
from jest_stream.metrics.flops import cost_ratio, forward_flops, training_flops

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a CLIP of open_clip: class token, MLPs of four times the width, linear heads."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    text_width: int
    text_layers: int
    words: int
    dimension: int

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Reads the sizes off a `open_clip.CLIP`."""
        visual = model.visual
        return cls(
            image_size=visual.image_size[0],
            patch_size=visual.patch_size[0],
            width=visual.conv1.out_channels,
            layers=len(visual.transformer.resblocks),
            text_width=model.token_embedding.embedding_dim,
            text_layers=len(model.transformer.resblocks),
            words=model.context_length,
            dimension=visual.proj.shape[1],
        )

    def forward(self, scoring: ScoringConfig | None = None) -> int:
        """Returns the FLOPs of one pair under a scoring setting, both towers."""
        scoring = scoring or ScoringConfig()
        image = scoring.image_size or self.image_size
        patch = scoring.patch_size or self.patch_size
        patches = (image // patch) ** 2
        kept = max(1, round(scoring.token_fraction * patches))
        patchify = 2 * patches * 3 * patch * patch * self.width
        blocks = transformer(kept + 1, self.width, self.layers)
        text = transformer(self.words, self.text_width, self.text_layers)
        heads = 2 * (self.width + self.text_width) * self.dimension
        return patchify + blocks + text + heads

    def ratio(self, scoring: ScoringConfig | None = None) -> float:
        """Returns the cost of scoring a pair over a full forward pass."""
        return self.forward(scoring) / self.forward()


def transformer(tokens: int, width: int, layers: int) -> int:
    """Returns the FLOPs of a pre-norm transformer: projections, attention, MLP."""
    projections = 4 * tokens * width * width
    attention = 2 * tokens * tokens * width
    mlp = 2 * tokens * width * 4 * width
    return 2 * layers * (projections + attention + mlp)


def sigmoid_loss(model: Any, batch: Batch) -> Tensor:
    """The mean over images of the loss of all pairs."""
    image = F.normalize(model.encode_image(batch[0]), dim=-1)
    text = F.normalize(model.encode_text(batch[1]), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T - 10
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(logits)


def pairs_for(shape: Shape, num_pairs: int) -> list[tuple[Tensor, Tensor]]:
    """Returns noise that the model takes."""
    generator = torch.Generator().manual_seed(0)
    size = (3, shape.image_size, shape.image_size)
    return [
        (
            torch.randn(size, generator=generator),
            torch.randint(2, 64, (shape.words,), generator=generator),
        )
        for _ in range(num_pairs)
    ]


@dataclass(frozen=True)
class Setting:
    """One way to run JEST, and what the formula says of it."""

    name: str
    scoring: ScoringConfig
    score: str = "learnability"
    is_cached: bool = False
    small_fraction: float = 0.0

    def expected(self, shape: Shape, filter_ratio: float) -> float:
        """Returns the formula's ratio to a uniform step, from FLOPs counted by hand."""
        cost = shape.ratio(self.scoring)
        return cost_ratio(
            filter_ratio,
            score=0 if self.score == "easy_reference" else cost,
            reference=0 if self.is_cached else cost,
            training=1 - self.small_fraction * (1 - cost),
        )


def settings(shape: Shape) -> list[Setting]:
    """Returns every setting that the benchmark names, for a model of these sizes."""
    full = ScoringConfig()
    half = ScoringConfig(image_size=shape.image_size // 2)
    return [
        Setting("live reference", full),
        Setting("cached reference", full, is_cached=True),
        Setting("half-size view", half),
        Setting("half-size view, cached", half, is_cached=True),
        Setting("patch x 2", ScoringConfig(patch_size=2 * shape.patch_size)),
        Setting("half of the tokens", ScoringConfig(token_fraction=0.5)),
        Setting("easy_reference", full, score="easy_reference"),
        Setting("easy_reference, half-size view", half, score="easy_reference"),
        Setting("half of each batch small", half, small_fraction=0.5),
        Setting("half of each batch small, cached", half, is_cached=True, small_fraction=0.5),
    ]


def counted(
    setting: Setting, build: Callable[[int], nn.Module], *, super_batch_size: int, batch_size: int
) -> tuple[float, float]:
    """Returns the FLOPs of a JEST step over those of a uniform step: as they run, and by metrics.

    Everything that the dataset does for a batch is counted as it is asked for the first: the copy
    made and resampled, both scoring passes, the selection.

    Args:
      build: makes a model from a seed.
    """
    model, reference = build(0), build(1)
    shape = Shape.of(model)
    pairs = pairs_for(shape, super_batch_size)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        judge: Any = reference
        if setting.is_cached:
            judge = ReferenceCache.build(pairs, reference, Path(folder) / "cache")
            opened.callback(judge.close)
        dataset = opened.enter_context(
            JESTDataset(
                pairs,
                learner=model,
                reference=judge,
                batch_size=batch_size,
                super_batch_size=super_batch_size,
                selection=SelectionConfig(score=setting.score, num_chunks=4, loss="sigmoid"),
                scoring=setting.scoring,
                score_view_fraction=setting.small_fraction,
                lookahead=0,
            )
        )
        batches: list[Any] = []
        scoring = forward_flops(lambda: batches.append(next(iter(dataset))))
        reported = dataset.metrics()["flops_ratio"]
    plain = stacked(pairs[:batch_size])
    uniform = training_flops(model, lambda trained: sigmoid_loss(trained, plain))
    training = training_flops(model, lambda trained: two_size_loss(trained, batches[0], setting))
    return (scoring + training) / uniform, reported


def two_size_loss(model: nn.Module, batch: Any, setting: Setting) -> Tensor:
    """The loss of a batch, of both of its parts where it has two."""
    if not setting.small_fraction:
        return sigmoid_loss(model, batch)
    large, small = batch
    small_model = at_score_size(model, setting.scoring)
    share = len(small[1]) / (len(small[1]) + len(large[1]))
    return (1 - share) * sigmoid_loss(model, large) + share * sigmoid_loss(small_model, small)


def stacked(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns pairs as a batch."""
    images, texts = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(texts)
