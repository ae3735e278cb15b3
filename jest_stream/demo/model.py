"""Defines the demo's two-tower model: a small vision transformer and a bag of hashed words.

It has the members that the adapters ask of any module: `encode_image`, `encode_text`, `logit_scale`
(the log) and `logit_bias`. One training step on 256 pairs takes about 0.1 s on two CPU cores.

Shapes: B: pairs, L: token ids per caption, T: image patches, W: width, D: embedding dimension.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY_SIZE = 8192
IMAGE_SIZE = 32
MAX_TOKENS = 64
PADDING = 0


class HashTokenizer:
    """Turns captions into ids of their words and 4-letter pieces, the same in every process."""

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.max_tokens = max_tokens

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Returns `[B, max_tokens]` int64 ids, 0 where a caption has fewer."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.full((len(texts), self.max_tokens), PADDING, dtype=torch.int64)
        for row, text in enumerate(texts):
            found = _hashed_ids(text)[: self.max_tokens]
            ids[row, : len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids


def _hashed_ids(text: str) -> list[int]:
    # Words first, since a long caption loses its last ids. "red car" has the words <red> and <car>
    # and the pieces <red, red>, <car, car>.
    words = re.findall(r"\w+", text.lower())
    marked = [f"<{word}>" for word in words]
    pieces = [word[at : at + 4] for word in marked for at in range(max(1, len(word) - 3))]
    # Python's own hash differs between processes. Id 0 is padding.
    return [1 + zlib.crc32(part.encode()) % (VOCABULARY_SIZE - 1) for part in marked + pieces]


class TwoTowerModel(nn.Module):
    """Embeds pictures and captions; the dot product says whether they match."""

    def __init__(
        self, *, width: int = 96, depth: int = 2, patch_size: int = 8, embedding_dim: int = 64
    ) -> None:
        super().__init__()
        self.visual = VisionTransformer(
            width=width, depth=depth, patch_size=patch_size, embedding_dim=embedding_dim
        )
        self.textual = BagOfTokens(width=width, embedding_dim=embedding_dim)
        # Start of SigLIP (https://arxiv.org/abs/2303.15343, section 3.2): nearly all pairs are
        # negatives, so the bias begins where the loss of an untrained model is small.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def encode_image(self, images: Tensor) -> Tensor:
        """Returns `[B, D]` embeddings, not normalised, of `[B, 3, height, width]` uint8 pixels."""
        embeddings: Tensor = self.visual(images.float() / 127.5 - 1)
        return embeddings

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns `[B, D]` embeddings, not normalised, of `[B, L]` token ids."""
        embeddings: Tensor = self.textual(tokens)
        return embeddings

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Returns the sigmoid loss of a batch of matching pairs."""
        return sigmoid_loss(
            F.normalize(self.encode_image(images), dim=-1),
            F.normalize(self.encode_text(tokens), dim=-1),
            self.logit_scale.exp(),
            self.logit_bias,
        )


class VisionTransformer(nn.Module):
    """Turns patches into one embedding by self-attention.

    A smaller image has fewer patches: candidates are scored at half the resolution for a quarter of
    the cost.
    """

    def __init__(self, *, width: int, depth: int, patch_size: int, embedding_dim: int) -> None:
        super().__init__()
        num_patches = IMAGE_SIZE // patch_size
        self.patches = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn(1, width, num_patches, num_patches) * 0.02)
        self.blocks = nn.Sequential(*(TransformerLayer(width) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embedding_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Returns `[B, D]` embeddings of `[B, 3, H, W]` images."""
        # 32 px are 4 x 4 patches, 16 px are 2 x 2: each then has the mean of four positions.
        patches = self.patches(images)  # [B, W, rows, columns]
        positions: Tensor = self.positions
        if patches.shape[-2:] != positions.shape[-2:]:
            positions = F.interpolate(positions, size=patches.shape[-2:], mode="area")
        tokens = (patches + positions).flatten(2).transpose(1, 2)  # [B, T, W]
        embeddings: Tensor = self.head(self.blocks(tokens).mean(dim=1))
        return embeddings


class TransformerLayer(nn.Module):
    """Adds attention, and then a two-layer perceptron, to its input."""

    def __init__(self, width: int, head_width: int = 32) -> None:
        super().__init__()
        self.num_heads = width // head_width
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = perceptron(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns `[B, T, W]` tokens of the same shape."""
        qkv = self.qkv(self.before_attention(tokens))  # [B, T, 3 W]
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, T, W / heads]
        tokens = tokens + self.out(mixed.transpose(1, 2).flatten(2))
        sum_of_both: Tensor = tokens + self.mlp(self.before_mlp(tokens))
        return sum_of_both


class BagOfTokens(nn.Module):
    """Turns token ids into one embedding: a perceptron on the mean of their embeddings."""

    def __init__(self, *, width: int, embedding_dim: int) -> None:
        super().__init__()
        self.tokens = nn.EmbeddingBag(VOCABULARY_SIZE, width, mode="mean", padding_idx=PADDING)
        self.mlp = nn.Sequential(nn.LayerNorm(width), perceptron(width, embedding_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns `[B, D]` embeddings of `[B, T]` token ids."""
        embeddings: Tensor = self.mlp(self.tokens(tokens))
        return embeddings


def perceptron(width: int, output_width: int) -> nn.Sequential:
    """Returns two layers with four times the width between them."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, output_width))


def sigmoid_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Returns the mean over images of the sigmoid loss of all their pairs.

    Args:
      image: `[B, D]` unit-norm rows.
      text: `[B, D]` unit-norm rows; row i belongs to image i.
      logit_scale: multiplier, exponentiated.
      logit_bias: offset.
    """
    logits = logit_scale * image @ text.T + logit_bias
    # All pairs as negatives; a positive costs softplus(-x) = softplus(x) - x.
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(logits)
