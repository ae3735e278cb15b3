"""These are the smallest real two-tower models, the views they take, and a dataset of them."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from jest_stream import JESTDataset

SIZE = 8
NUM_WORDS = 64


def to_tensor(image: Image.Image) -> Tensor:
    """Returns `[3, SIZE, SIZE]`, deterministic."""
    pixels = np.asarray(image.resize((SIZE, SIZE)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def flipped(image: Image.Image) -> Tensor:
    """Returns a random view: draws from torch's global generator, as torchvision does."""
    return to_tensor(image).flip(-1) + torch.rand(())


def tokenize(text: str) -> Tensor:
    """Returns `[4]` word ids."""
    words = [zlib.crc32(word.encode()) % NUM_WORDS for word in text.split()][:4]
    return torch.tensor(words + [0] * (4 - len(words)))


class TinyTwoTower(nn.Module):
    """A linear image tower and a bag of words; a sigmoid model if it has a bias."""

    def __init__(self, seed: int = 0, *, width: int = 16, has_bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image = nn.Parameter(torch.randn(3 * SIZE * SIZE, width, generator=generator))
        self.words = nn.Parameter(torch.randn(NUM_WORDS, width, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0)) if has_bias else None

    def encode_image(self, image: Tensor) -> Tensor:
        return image.flatten(1) @ self.image

    def encode_text(self, text: Tensor) -> Tensor:
        return self.words[text].mean(dim=1)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Returns the sigmoid loss of a batch."""
        images = F.normalize(self.encode_image(image), dim=-1)
        texts = F.normalize(self.encode_text(text), dim=-1)
        logits = self.logit_scale.exp() * images @ texts.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        labels = 2 * torch.eye(len(logits)) - 1
        return -F.logsigmoid(labels * logits).sum() / len(logits)


class Plain(nn.Module):
    """The least that is accepted: two methods and a scale."""

    def __init__(self, dimension: int = 4) -> None:
        super().__init__()
        self.visual = nn.Linear(6, dimension)
        self.textual = nn.Linear(3, dimension)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.textual(text)


def train_step(model: TinyTwoTower, batch: tuple[Tensor, Tensor]) -> None:
    """One step of plain gradient descent."""
    loss = model(*batch)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter -= 0.05 * grad


def tiny_dataset(source: Any, **options: Any) -> JESTDataset:
    """Batches of 4 out of 8, as dicts, chosen by two untrained models; unless told otherwise."""
    usual: dict[str, Any] = {
        "learner": TinyTwoTower(seed=1),
        "reference": TinyTwoTower(seed=2),
        "transform": to_tensor,
        "tokenizer": tokenize,
        "batch_size": 4,
        "super_batch_size": 8,
        "as_dict": True,
    }
    return JESTDataset(source, **{**usual, **options})
