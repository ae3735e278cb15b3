"""These data and models serve the tests of scoring beside training on a GPU, and their benchmark.

`python tests/support/gpu_streams.py` runs a short stream on the GPU; under TORCH_CUDA_SANITIZER=1
that is the search for races.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from jest_stream import JESTDataset  # noqa: E402

NUM_EXAMPLES = 4096


class Pairs:
    """Examples that are known by their number, which fills the image and heads the text."""

    def __init__(self, num_pixels: int = 3 * 32 * 32) -> None:
        self._num_pixels = num_pixels

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(NUM_EXAMPLES):
            text = torch.tensor([number, number % 7, number % 11, number % 13])
            image = torch.full((3, self._num_pixels // 3, 1), float(number))
            yield {"__key__": str(number), "image": image, "text": text}


class Towers(nn.Module):
    """Two towers that keep a GPU busy for a while."""

    def __init__(self, seed: int, *, num_pixels: int = 3 * 32 * 32, width: int = 256) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.visual = nn.Sequential(
            nn.Flatten(), nn.Linear(num_pixels, width), nn.GELU(), nn.Linear(width, width)
        )
        self.textual = nn.EmbeddingBag(NUM_EXAMPLES, width)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0))
        self.sleeps = 0
        """Clock cycles for which the device does nothing, in scoring only."""

    def encode_image(self, image: Tensor) -> Tensor:
        if self.sleeps and not self.training and image.is_cuda:
            torch.cuda._sleep(self.sleeps)
        return self.visual(image / NUM_EXAMPLES)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.textual(text)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Returns the sigmoid loss of a batch."""
        images = F.normalize(self.encode_image(image), dim=-1)
        texts = F.normalize(self.encode_text(text), dim=-1)
        logits = self.logit_scale.exp() * images @ texts.T + self.logit_bias
        labels = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(labels * logits).sum() / len(logits)


def dataset_of(learner: nn.Module, **options: Any) -> JESTDataset:
    """Returns a dataset of `Pairs` whose reference is of the learner's kind, as dicts."""
    device = next(learner.parameters()).device
    reference = options.pop("reference", None) or Towers(seed=2).to(device)
    return JESTDataset(
        options.pop("source", None) or Pairs(),
        learner=learner,
        reference=reference,
        as_dict=True,
        **{"batch_size": 64, "super_batch_size": 256, **options},
    )


def descend(learner: nn.Module, image: Tensor, text: Tensor) -> None:
    """One step of plain gradient descent, without a wait for the device."""
    parameters = list(learner.parameters())
    grads = torch.autograd.grad(learner(image, text), parameters)
    with torch.no_grad():
        torch._foreach_add_(parameters, list(grads), alpha=-0.01)


def main() -> None:
    learner = Towers(seed=1).cuda()
    learner.sleeps = 1_000_000
    for lookahead in (0, 1, 2):
        with dataset_of(learner, lookahead=lookahead) as dataset:
            for step, batch in enumerate(dataset):
                descend(learner, batch["image"].float(), batch["text"])
                batch["image"] /= 255
                (batch["weight"] * 2).sum()
                if step == 8:
                    break
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
