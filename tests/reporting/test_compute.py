"""Counted FLOPs agree with a count by hand, and the cost formula with its published table.

Run: pytest tests/reporting/test_compute.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jest_stream.errors import ConfigError
from jest_stream.reporting import cost_ratio, forward_flops, step_flops, training_flops

WIDTH, LAYERS, HEADS, DIMENSION, TOKENS, WORDS = 64, 3, 4, 32, 17, 12


def build_open_clip() -> nn.Module:
    import open_clip

    vision = {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS}
    vision |= {"image_size": 32, "patch_size": 8}  # 16 patches and the class token
    text = {"context_length": WORDS, "vocab_size": 64, "width": WIDTH}
    text |= {"heads": HEADS, "layers": LAYERS}
    return open_clip.CLIP(DIMENSION, vision, text).eval()


def transformer_flops(tokens: int) -> int:
    """Multiply-adds times two of a pre-norm transformer with an MLP of four times the width."""
    projections = 4 * tokens * WIDTH * WIDTH  # query, key, value, output
    attention = 2 * tokens * tokens * WIDTH  # scores, and their use
    mlp = 2 * tokens * WIDTH * 4 * WIDTH
    return 2 * LAYERS * (projections + attention + mlp)


def test_an_open_clip_model_counts_as_by_hand():
    model = build_open_clip()
    patches = 2 * 16 * (3 * 8 * 8) * WIDTH
    projection = 2 * WIDTH * DIMENSION
    image, text = torch.randn(1, 3, 32, 32), torch.randint(1, 64, (1, WORDS))
    got = forward_flops(model.encode_image, image)
    assert got == pytest.approx(patches + transformer_flops(TOKENS) + projection, rel=0.01)
    got = forward_flops(model.encode_text, text)
    assert got == pytest.approx(transformer_flops(WORDS) + projection, rel=0.01)


def test_flops_grow_with_the_rows():
    model = build_open_clip()
    one, four = torch.randn(1, 3, 32, 32), torch.randn(4, 3, 32, 32)
    assert forward_flops(model.encode_image, four) == 4 * forward_flops(model.encode_image, one)


class Encoder(nn.Module):
    """torch's own transformer, whose fast path the counter does not see."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


@pytest.mark.parametrize("is_training", [False, True])
def test_torchs_own_transformer_counts_in_eval_mode_too(is_training: bool):
    model = Encoder().train(is_training)
    tokens = torch.randn(1, WORDS, WIDTH)
    assert forward_flops(model, tokens) == transformer_flops(WORDS)
    with torch.inference_mode():
        assert forward_flops(model, tokens) == transformer_flops(WORDS)


def test_attention_counts_in_full():
    query = torch.randn(2, HEADS, 10, 16)
    by_hand = 2 * 2 * HEADS * (10 * 10 * 16) * 2
    attention = F.scaled_dot_product_attention
    assert forward_flops(attention, query, query, query) == by_hand
    assert forward_flops(attention, query, query, query, None, 0.0, True) == by_hand  # causal


def test_a_training_step_costs_three_forward_passes_less_the_first_layers_input():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    inputs = torch.randn(7, 10)
    forward = 2 * 7 * (10 * 20 + 20 * 5)
    # Backward: the weights' gradients cost a forward pass, the inputs' another one, which the
    # first layer does not need.
    by_hand = 3 * forward - 2 * 7 * 10 * 20
    assert training_flops(model, lambda copied: copied(inputs).sum()) == by_hand


def test_a_training_step_of_attention_costs_three_forward_passes_on_any_device():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(2, HEADS, 10, 16))

    def loss(module: nn.Module) -> Tensor:
        return F.scaled_dot_product_attention(module.query, module.query, module.query).sum()

    forward = 2 * 2 * HEADS * (10 * 10 * 16) * 2
    assert training_flops(Attention(), loss) == 3 * forward  # fused kernels compute more
    with torch.inference_mode():
        assert training_flops(Attention(), loss) == 3 * forward


def test_nothing_is_changed_by_counting():
    model = build_open_clip().train()
    model.visual.register_buffer("statistic", torch.zeros(()))
    image, text = torch.randn(2, 3, 32, 32), torch.randint(1, 64, (2, WORDS))
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def loss(trained: nn.Module) -> Tensor:
        assert trained is not model and trained.training
        trained.visual.statistic += 1
        dropped = F.dropout(trained.encode_image(image))
        return (dropped * trained.encode_text(text)).sum()

    training_flops(model, loss)
    forward_flops(lambda: F.dropout(model.encode_image(image)))

    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_switches_are_put_back_after_an_error():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with pytest.raises(RuntimeError):
            forward_flops(nn.Linear(2, 2), torch.ones(1, 3))
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_compiled_model_counts_as_the_plain_one():
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        traced.append("once")
        return graph

    compiled = torch.compile(nn.Linear(8, 8), backend=backend)
    inputs = torch.randn(2, 8)
    compiled(inputs)
    assert forward_flops(compiled, inputs) == 2 * 2 * 8 * 8
    compiled(inputs)
    assert traced == ["once"]  # counting neither traced it anew nor made later calls do so


@pytest.mark.parametrize(
    ("filter_ratio", "uncached", "cached", "reused", "flexi", "cheap"),
    [
        (0.5, 2.33, 1.67, 1.33, 0.83, 1.19),
        (0.8, 4.33, 2.67, 2.33, 1.11, 1.47),
        (0.9, 7.67, 4.33, 4.00, 1.57, 1.93),
    ],
)
def test_the_cost_formula_gives_the_known_table(
    filter_ratio: float, uncached: float, cached: float, reused: float, flexi: float, cheap: float
):
    def rounded(**settings: float) -> float:
        return round(cost_ratio(filter_ratio, **settings), 2)

    assert rounded() == uncached
    assert rounded(reference=0) == cached
    assert rounded(reference=0, reuse=1) == reused
    assert rounded(reference=0, score=0.28) == cheap
    assert cost_ratio(filter_ratio, reference=0, score=0.28, training=0.64) == pytest.approx(
        flexi,
        abs=0.011,  # the table's 0.64 is rounded
    )


def test_step_costs_agree_with_the_formula():
    step = step_flops(
        super_batch_size=1280, batch_size=256, training=30, learner_forward=10, reference_forward=10
    )
    assert (step.training, step.learner_scoring, step.reference_scoring) == (7680, 12800, 12800)
    assert step.ratio == pytest.approx(cost_ratio(0.8))
    uniform = step_flops(super_batch_size=256, batch_size=256, training=30)
    assert (uniform.total, uniform.ratio) == (7680, 1.0)


def test_selection_costs_a_third_of_a_percent_of_encoding_at_the_papers_size():
    step = step_flops(
        super_batch_size=163_840,
        batch_size=32_768,
        training=3 * 57e9,
        learner_forward=57e9,
        reference_forward=0,
        dimensions=(768, 768),
    )
    assert step.selection == pytest.approx(33e12, rel=0.01)
    assert step.selection / step.learner_scoring == pytest.approx(0.0035, rel=0.02)


def test_every_sweep_costs_one_more_selection():
    plain, swept = (
        step_flops(
            super_batch_size=100, batch_size=20, training=1.0, dimensions=(8, 4), num_sweeps=sweeps
        )
        for sweeps in (0, 2)
    )
    assert plain.selection == 4 * 100 * 20 * 12 and swept.selection == 3 * plain.selection


def test_a_filter_ratio_that_keeps_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"filter_ratio must be in \[0, 1\), got 1"):
        cost_ratio(1)
