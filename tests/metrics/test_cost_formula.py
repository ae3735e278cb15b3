"""The cost of a JEST step agrees with the formula within 2 %, in every way to score cheaply.

Counted as it runs, through the public dataset; expected from FLOPs of the towers by hand.

Run: pytest tests/metrics/test_cost_formula.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.vit_flops import Setting, Shape, counted, settings
from torch import nn

from jest_stream import ScoringConfig
from jest_stream.metrics.flops import forward_flops
from jest_stream.scoring.learner import LearnerCopy

SHAPE = Shape(
    image_size=64,
    patch_size=8,
    width=128,
    layers=4,
    text_width=64,
    text_layers=3,
    words=16,
    dimension=32,
)


def build(seed: int) -> nn.Module:
    """A CLIP of open_clip of these sizes."""
    import open_clip

    torch.manual_seed(seed)
    vision = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 2, "layers": 3}
    return open_clip.CLIP(32, vision, text).eval()


def test_the_sizes_are_read_off_the_model() -> None:
    assert Shape.of(build(0)) == SHAPE


@pytest.mark.parametrize("setting", settings(SHAPE), ids=lambda setting: setting.name)
def test_a_counted_step_costs_what_the_formula_says(setting: Setting) -> None:
    ratio, reported = counted(setting, build, super_batch_size=40, batch_size=8)
    assert ratio == pytest.approx(setting.expected(SHAPE, 0.8), rel=0.02)
    assert reported == pytest.approx(setting.expected(SHAPE, 0.8), rel=0.02)


def test_counts_are_the_same_in_every_run() -> None:
    setting = settings(SHAPE)[2]
    first, second = (counted(setting, build, super_batch_size=10, batch_size=2) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "scoring",
    [
        {},
        {"image_size": 32},
        {"patch_size": 16},
        {"token_fraction": 0.25},
        {"image_size": 48, "patch_size": 12, "token_fraction": 0.5},
    ],
    ids=str,
)
def test_the_copy_scores_with_the_flops_counted_by_hand(scoring: dict[str, Any]) -> None:
    setting = ScoringConfig(**scoring)
    side = setting.image_size or 64
    inputs = torch.randn(4, 3, side, side), torch.randint(2, 64, (4, 16))
    exact = LearnerCopy(build(0), refresh_every=1, scoring=setting)
    got = forward_flops(exact.embed, *inputs)
    assert got == pytest.approx(4 * SHAPE.forward(setting), rel=0.001)
    half = forward_flops(lambda: exact.embed(*inputs, autocast_dtype=torch.bfloat16))
    assert half == got  # bf16 saves time, not FLOPs


def test_cheaper_settings_are_cheaper() -> None:
    found = {setting.name: setting.expected(SHAPE, 0.8) for setting in settings(SHAPE)}
    assert found["live reference"] == pytest.approx(13 / 3)
    assert found["cached reference"] == pytest.approx(8 / 3)
    assert found["easy_reference"] == pytest.approx(8 / 3)
    assert found["half-size view, cached"] < 1.6 < found["half-size view"]
    assert found["half of each batch small, cached"] < found["half-size view, cached"]
