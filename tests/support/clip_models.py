"""These are the smallest real open_clip models, untrained but seeded, and folders that hold them.

The folder is open_clip's own layout: `open_clip_config.json` and `open_clip_model.safetensors`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

IMAGE_SIZE = 32


def config(*, dimension: int = 32, image_size: int = IMAGE_SIZE, has_bias: bool = True) -> Any:
    """Returns the description of a two-tower model as open_clip's files hold it."""
    model: dict[str, Any] = {
        "embed_dim": dimension,
        "vision_cfg": {
            "image_size": image_size,
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }
    if has_bias:
        model |= {"init_logit_bias": -10.0}
    return model


def write_folder(folder: Path, *, seed: int = 0, **options: Any) -> str:
    """Writes a seeded model as open_clip would; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model_cfg": config(**options), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    weights = folder / "open_clip_model.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, weights)
    return str(folder)
