"""The learner at the score size shares the learner's weights: training there reaches them.

Run: pytest tests/scoring/test_at_score_size.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.vision_models import (
    OPEN_CLIP,
    TIMM,
    clone,
    open_clip_model,
    pixels,
    timm_model,
    transformers_model,
    words,
)
from torch import Tensor, nn
from torch.nn import functional as F

from jest_stream import ScoringConfig, at_score_size
from jest_stream.errors import ConfigError
from jest_stream.scoring.learner import LearnerCopy

MODELS: dict[str, Any] = {
    **{f"open_clip {k}": (lambda v=v: open_clip_model(**v)) for k, v in OPEN_CLIP.items()},
    **{f"timm {k}": (lambda v=v: timm_model(**v)) for k, v in TIMM.items()},
    "transformers clip": lambda: transformers_model("clip"),
    "transformers siglip": lambda: transformers_model("siglip"),
}
SETTINGS = [{"scale": 0.5}, {"patch": 2}, {"scale": 0.5, "token_fraction": 0.5}]


def setting(model: Any, scale: float = 1, patch: int = 1, **more: Any) -> tuple[ScoringConfig, int]:
    """A setting relative to the model's own sizes, and the image size that it takes."""
    trunk = getattr(getattr(model, "visual", model), "trunk", None)
    own, side = (64, 8) if trunk is None else (trunk.patch_embed.img_size[0], 0)
    side = side or trunk.patch_embed.patch_size[0]
    image = int(own * scale) // (side * patch) * side * patch
    return ScoringConfig(image_size=image, patch_size=side * patch, **more), image


def images_of(model: Any, image: Tensor) -> Tensor:
    """The unit-norm image embeddings, with gradients."""
    if hasattr(model, "encode_image"):
        return F.normalize(model.encode_image(image), dim=-1)
    output = model.get_image_features(pixel_values=image)
    return F.normalize(getattr(output, "pooler_output", output), dim=-1)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_it_embeds_as_the_copy_does(name: str, options: dict[str, Any]) -> None:
    model = MODELS[name]()
    scoring, side = setting(model, **options)
    small = at_score_size(model, scoring)
    assert isinstance(small, type(model))
    learner_copy = LearnerCopy(model, refresh_every=1, scoring=scoring)
    for _ in range(2):  # also after the weights have moved
        is_named = name.startswith("transformers")
        text: Any = {"input_ids": words()} if is_named else words()
        image: Any = {"pixel_values": pixels(side)} if is_named else pixels(side)
        expected = learner_copy.embed(image, text).image
        torch.testing.assert_close(images_of(small, pixels(side)), expected, atol=1e-6, rtol=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        learner_copy.refresh(1)


@pytest.mark.parametrize("name", MODELS)
def test_its_parameters_are_the_learners_own(name: str) -> None:
    model = MODELS[name]()
    scoring, side = setting(model, scale=0.5, token_fraction=0.5)
    before = clone(model.state_dict())
    small = at_score_size(model, scoring)
    mine, theirs = dict(small.named_parameters()), dict(model.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[key] is theirs[key] for key in theirs)
    images_of(small.train(), pixels(side)).sum().backward()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with torch.no_grad():
        images_of(model.eval(), pixels(setting(model)[1]))  # takes its own size as before


def resized_explicitly(model: nn.Module, weights: dict[str, Tensor], image: Tensor) -> Tensor:
    """An open_clip model of 32 px in patches of 16, its weights resized by timm from `weights`."""
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    small = open_clip_model(image_size=32, patch_size=16)
    made = dict(weights)
    made["visual.conv1.weight"] = resample_patch_embed(weights["visual.conv1.weight"], [16, 16])
    positions = weights["visual.positional_embedding"]
    made["visual.positional_embedding"] = resample_abs_pos_embed(positions[None], [2, 2])[0]

    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small

        def forward(self, image: Tensor) -> Tensor:
            return F.normalize(self.model.encode_image(image), dim=-1)

    named = {f"model.{key}": value for key, value in made.items()}
    return torch.func.functional_call(Image(), named, (image,))


def test_gradients_are_those_of_an_explicit_resize() -> None:
    model = open_clip_model()
    small = at_score_size(model, ScoringConfig(image_size=32, patch_size=16))
    target = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))

    (images_of(small, pixels(32)) * target).sum().backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}

    weights = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    (resized_explicitly(model, weights, pixels(32)) * target).sum().backward()
    assert got["visual.positional_embedding"] is not None
    assert got["visual.conv1.weight"] is not None
    for name, tensor in weights.items():
        assert (got[name] is None) == (tensor.grad is None), name
        if tensor.grad is not None:
            torch.testing.assert_close(got[name], tensor.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_gradients_of_both_sizes_add_up() -> None:
    model = open_clip_model()
    small = at_score_size(model, ScoringConfig(image_size=32))
    parts = []
    for part in (lambda: images_of(model, pixels(64)), lambda: images_of(small, pixels(32))):
        model.zero_grad()
        part()[:, 0].sum().backward()
        parts.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    (images_of(model, pixels(64))[:, 0].sum() + images_of(small, pixels(32))[:, 0].sum()).backward()
    for name, parameter in model.named_parameters():
        if name in parts[0]:
            expected = parts[0][name] + parts[1][name]
            torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)


def test_what_happens_to_the_learner_later_holds_for_both() -> None:
    model: Any = open_clip_model()
    small: Any = at_score_size(model, ScoringConfig(image_size=32))
    model.train()
    assert small.training and small.visual.training and small.visual.transformer.training
    small.eval()
    assert not model.training and not model.visual.conv1.training
    other = open_clip_model(seed=5)
    model.load_state_dict(other.state_dict(), assign=True)
    expected = at_score_size(other, ScoringConfig(image_size=32))
    image = pixels(32)
    torch.testing.assert_close(images_of(small, image), images_of(expected, image))
    model.double()
    assert images_of(small, image.double()).dtype == torch.float64
    model.to("meta")
    assert small.encode_image(image.to("meta")).is_meta
    assert small.encode_text(words().to("meta")).is_meta


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model: Any = open_clip_model().train()
    scoring = ScoringConfig(image_size=32, token_fraction=0.5)
    small = at_score_size(model, scoring)
    found = []
    for is_checkpointed in (False, True):
        model.set_grad_checkpointing(is_checkpointed)  # reaches the small one too
        model.zero_grad()
        images_of(small, pixels(32))[:, 0].sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


def test_it_can_be_copied_and_the_copy_is_independent() -> None:
    model = open_clip_model()
    small = at_score_size(model, ScoringConfig(image_size=32))
    expected = images_of(small, pixels(32))
    copied = clone(small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(images_of(copied, pixels(32)), expected)


def test_wrappers_are_looked_through_and_compiled_layers_refused() -> None:
    model = open_clip_model()
    scoring = ScoringConfig(image_size=32)
    compiled = torch.compile(model, backend="eager")
    small = at_score_size(compiled, scoring)
    assert next(small.parameters()) is next(model.parameters())
    model.visual = torch.compile(model.visual, backend="eager")
    with pytest.raises(ConfigError, match="visual was compiled by itself.*before compiling"):
        at_score_size(model, scoring)


def test_a_model_that_takes_any_size_is_returned_as_it_is() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))

        def encode_image(self, image: Tensor) -> Tensor:
            return image.mean((2, 3)) @ self.weight

    model = Own()
    assert at_score_size(model, ScoringConfig(image_size=32)) is model
    whole = open_clip_model()
    assert at_score_size(whole, ScoringConfig(autocast_dtype=torch.bfloat16)) is whole
    with pytest.raises(ConfigError, match="scoring.patch_size=16, but the learner's image tower"):
        at_score_size(model, ScoringConfig(patch_size=16))
