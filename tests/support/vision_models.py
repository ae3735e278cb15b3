"""Small two-tower models take the image towers of open_clip, timm and transformers.

Real architectures, random weights. All take images of 64 px, but for timm's, which have their own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

WORDS, DIMENSION = 12, 32
VISION = {"image_size": 64, "patch_size": 8, "layers": 2, "width": 64, "head_width": 16}
TEXT = {"context_length": WORDS, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}

OPEN_CLIP: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    "sine positions": {"pos_embed_type": "sin_cos_2d"},
    "attention pool": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "patch dropout": {"patch_dropout": 0.5},
    "layer scale": {"ls_init_value": 0.1},
}
"""open_clip's own vision transformer, by what is particular."""

TIMM: dict[str, dict[str, Any]] = {
    "class token": {"name": "test_vit"},
    "registers": {"name": "test_vit2"},
    "mean": {"name": "test_vit", "pool": "avg", "class_token": False},
    "no positions for the class token": {"name": "test_vit", "no_embed_class": True},
    "attention pool": {"name": "test_vit3", "pool": "map"},
    "any size by itself": {"name": "test_vit", "dynamic_img_size": True},
    "distilled": {"name": "deit_tiny_distilled_patch16_224", "depth": 2},
    "rotary": {"name": "eva02_tiny_patch14_224", "depth": 2},
    "mixed rotary": {"name": "vit_small_patch16_rope_mixed_224", "depth": 2, "embed_dim": 96},
    "rotary of dinov3": {"name": "vit_small_patch16_dinov3", "depth": 2},
}
"""timm's, in open_clip's adapter."""


def open_clip_model(seed: int = 0, **vision: Any) -> nn.Module:
    """Returns a CLIP with open_clip's own tower."""
    import open_clip

    torch.manual_seed(seed)
    return open_clip.CLIP(DIMENSION, {**VISION, **vision}, TEXT).eval()


def timm_model(name: str, *, pool: str = "", seed: int = 0, **options: Any) -> nn.Module:
    """Returns a CLIP whose image tower is timm's model of that name."""
    import timm
    from open_clip.timm_model import TimmModel

    model = open_clip_model(seed)
    model.visual = TimmModel("test_vit", DIMENSION, pool="", proj="linear")
    if pool and not (options.get("global_pool") or pool == "map"):
        options["global_pool"] = pool
    trunk = timm.create_model(name, num_classes=0, **options)
    model.visual.trunk = trunk
    model.visual.head.proj = nn.Linear(trunk.num_features, DIMENSION, bias=False)
    # Position embeddings and tokens that begin near zero would hide mistakes.
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def transformers_model(kind: str, seed: int = 0) -> nn.Module:
    """Returns transformers' `"clip"` or `"siglip"`."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    torch.manual_seed(seed)
    layers: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = {**layers, "num_hidden_layers": 2, "image_size": 64, "patch_size": 8}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {**layers, **tokens, "num_hidden_layers": 1, "vocab_size": 64}
    text["max_position_embeddings"] = WORDS
    if kind == "clip":
        config: Any = CLIPConfig(vision_config=vision, text_config=text, projection_dim=DIMENSION)
        return CLIPModel(config).eval()
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()


def pixels(size: int, num_rows: int = 3, seed: int = 0) -> Tensor:
    """Returns `[n, 3, size, size]` noise."""
    return torch.randn(num_rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


def words(num_rows: int = 3) -> Tensor:
    """Returns `[n, WORDS]` token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 64, (num_rows, WORDS), generator=generator)


def clone(model: nn.Module) -> Any:
    """Returns an independent copy."""
    return copy.deepcopy(model)
