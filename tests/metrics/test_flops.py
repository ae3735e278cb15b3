"""Counted FLOPs agree with a count by hand, and the cost formula with its published table.

Run: pytest tests/metrics/test_flops.py
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jest_stream.errors import ConfigError
from jest_stream.metrics.flops import Flops, cost_ratio, forward_flops, training_flops
from jest_stream.selection.cost import num_conditioned_on, selection_flops
from jest_stream.selection.joint import joint_selection
from jest_stream.types import Embeddings

WIDTH, LAYERS, HEADS, DIMENSION, TOKENS, WORDS = 64, 3, 4, 32, 17, 12


def build_open_clip() -> nn.Module:
    import open_clip

    vision = {"layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS}
    vision |= {"image_size": 32, "patch_size": 8}  # 16 patches and the class token
    return open_clip.CLIP(DIMENSION, vision, text_config()).eval()


def build_open_clip_with_timm() -> nn.Module:
    """An image tower of timm: width 192, 12 layers, 3 heads, patches of 16."""
    import open_clip

    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_model_pretrained": False}
    vision |= {"timm_pool": "", "timm_proj": "linear", "image_size": 224}
    return open_clip.CustomTextCLIP(DIMENSION, vision, text_config()).eval()


def text_config() -> dict[str, int]:
    return {
        "context_length": WORDS,
        "vocab_size": 64,
        "width": WIDTH,
        "heads": HEADS,
        "layers": LAYERS,
    }


def transformer_flops(tokens: int, width: int = WIDTH, layers: int = LAYERS) -> int:
    """Multiply-adds times two of a pre-norm transformer with an MLP of four times the width."""
    projections = 4 * tokens * width * width  # query, key, value, output
    attention = 2 * tokens * tokens * width  # scores, and their use
    mlp = 2 * tokens * width * 4 * width
    return 2 * layers * (projections + attention + mlp)


def test_both_towers_of_open_clip_count_as_by_hand():
    model = build_open_clip()
    patches = 2 * 16 * (3 * 8 * 8) * WIDTH
    projection = 2 * WIDTH * DIMENSION  # of the pooled token alone
    image, text = torch.randn(1, 3, 32, 32), torch.randint(1, 64, (1, WORDS))
    got = forward_flops(model.encode_image, image)
    assert got == patches + transformer_flops(TOKENS) + projection
    got = forward_flops(model.encode_text, text)
    assert got == transformer_flops(WORDS) + projection


def test_a_timm_tower_in_open_clip_counts_as_by_hand():
    model = build_open_clip_with_timm()
    patches = 2 * 196 * (3 * 16 * 16) * 192
    projection = 2 * 192 * DIMENSION
    image, text = torch.randn(1, 3, 224, 224), torch.randint(1, 64, (1, WORDS))
    got = forward_flops(model.encode_image, image)
    assert got == patches + transformer_flops(1 + 196, width=192, layers=12) + projection
    got = forward_flops(model.encode_text, text)
    assert got == transformer_flops(WORDS) + 2 * WIDTH * DIMENSION


def test_a_timm_tower_with_an_attention_pool_counts_as_by_hand():
    import timm

    model = timm.create_model(  # SigLIP's image tower, small
        "vit_base_patch16_siglip_224",
        img_size=32,
        patch_size=8,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=0,
    ).eval()
    patches = 2 * 16 * (3 * 8 * 8) * WIDTH
    query_and_output = 2 * 2 * WIDTH * WIDTH  # of one token
    keys_and_values = 2 * 16 * WIDTH * 2 * WIDTH
    attention = 2 * 2 * 16 * WIDTH
    mlp = 2 * 2 * WIDTH * 4 * WIDTH
    pool = query_and_output + keys_and_values + attention + mlp
    got = forward_flops(model, torch.randn(1, 3, 32, 32))
    assert got == patches + transformer_flops(16) + pool


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


def test_a_step_of_known_cost_agrees_with_the_formula():
    step = Flops(
        training=256 * 30,
        learner_scoring=1280 * 10,
        reference_scoring=1280 * 10,
        selection=0,
        reusable=256 * 10,
    )
    assert step.ratio == pytest.approx(cost_ratio(0.8))
    assert step.ratio_with_reuse == pytest.approx(cost_ratio(0.8, reuse=1))
    nothing = Flops(training=0, learner_scoring=0, reference_scoring=0, selection=0)
    assert math.isnan(nothing.ratio) and math.isnan(nothing.ratio_with_reuse)


def test_selection_costs_a_third_of_a_percent_of_encoding_at_the_papers_size():
    given = num_conditioned_on(32_768, 16, 0)
    selection = selection_flops(163_840, given, (768, 768))
    assert given == 32_768 * 15 // 16
    assert selection == pytest.approx(33e12 * 15 / 16, rel=0.01)
    assert selection / (163_840 * 57e9) == pytest.approx(0.0035 * 15 / 16, rel=0.02)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("batch_size", "num_chunks", "num_sweeps"), [(20, 6, 0), (20, 6, 2), (20, 20, 1), (20, 1, 3)]
)
def test_selection_costs_what_the_counter_sees(
    batch_size: int, num_chunks: int, num_sweeps: int, loss: str
):
    generator = torch.Generator().manual_seed(0)
    models = [
        Embeddings(
            image=F.normalize(torch.randn(100, dim, generator=generator), dim=1),
            text=F.normalize(torch.randn(100, dim, generator=generator), dim=1),
            logit_scale=10.0,
        )
        for dim in (8, 24)
    ]
    counted = forward_flops(
        lambda: joint_selection(
            *models,
            batch_size=batch_size,
            num_chunks=num_chunks,
            num_sweeps=num_sweeps,
            loss=loss,
            key=0,
            step=0,
        )
    )
    given = num_conditioned_on(batch_size, num_chunks, num_sweeps)
    assert counted == selection_flops(100, given, (8, 24))
    assert given == {(6, 0): 17, (6, 2): 57, (20, 1): 39, (1, 3): 0}[num_chunks, num_sweeps]


def test_a_filter_ratio_that_keeps_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"filter_ratio must be in \[0, 1\), got 1"):
        cost_ratio(1)
