"""Training at two sizes on two ranks averages both sizes' gradients by one backward pass.

pytest tests/test_two_sizes_ranks.py
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from support.leaks import no_leaks  # noqa: F401
from support.ranks import on_ranks
from support.shards import write_shards
from support.vision_models import WORDS, open_clip_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2.functional import pil_to_tensor

from jest_stream import JESTDataset, ScoringConfig, at_score_size

pytestmark = pytest.mark.usefixtures("no_leaks")

SCORING = ScoringConfig(image_size=32)  # of 64


class AnySize(nn.Module):
    """Takes smaller images by itself."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.visual = nn.Conv2d(3, 16, kernel_size=8, stride=8)
        self.textual = nn.EmbeddingBag(64, 16)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image).relu().mean((2, 3))

    def encode_text(self, text: Tensor) -> Tensor:
        return self.textual(text)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.encode_image(image), self.encode_text(text), self.logit_scale.exp()


def pixels(image: Any) -> Tensor:
    return pil_to_tensor(image.resize((64, 64))).float() / 255


def tokens(text: str) -> Tensor:
    return torch.tensor(list(text.encode().ljust(WORDS))[:WORDS]) % 64


def contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def train(shards: list[str], make: Any) -> None:
    """Two steps, each checked against the mean of what the ranks find by themselves."""
    learner = make(seed=0)
    model = DistributedDataParallel(learner)
    small_model, small_learner = (at_score_size(each, SCORING) for each in (model, learner))
    parameters = list(learner.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    dataset = JESTDataset(
        shards,
        learner=model,
        reference=make(seed=1),
        transform=pixels,
        tokenizer=tokens,
        scoring=SCORING,
        score_view_fraction=0.5,
        batch_size=4,
        filter_ratio=0.5,
    )
    with dataset:
        for large, small in islice(dataset, 2):
            own = contrastive(*learner(*large)) + contrastive(*small_learner(*small))
            means = torch.autograd.grad(own, parameters)
            for mean in means:
                torch.distributed.all_reduce(mean)
            optimizer.zero_grad()
            (contrastive(*model(*large)) + contrastive(*small_model(*small))).backward()
            for parameter, mean in zip(parameters, means, strict=True):
                torch.testing.assert_close(parameter.grad, mean / 2)
            optimizer.step()


@pytest.mark.parametrize("make", [open_clip_model, AnySize])
def test_one_backward_pass_averages_the_gradients_of_both_sizes(tmp_path: Path, make: Any) -> None:
    shards = write_shards(tmp_path / "shards", num_shards=4, examples_per_shard=12)
    on_ranks(2, tmp_path, train, shards, make)
