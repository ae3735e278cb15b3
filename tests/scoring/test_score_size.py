"""A copy that scores at another size agrees with the libraries' own resized models.

Run: pytest tests/scoring/test_score_size.py
"""

from __future__ import annotations

import io
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

from jest_stream import ScoringConfig
from jest_stream.errors import ResumeMismatchError
from jest_stream.scoring.learner import LearnerCopy
from jest_stream.scoring.reference import ReferenceModel
from jest_stream.scoring.two_tower import two_tower

SIZES = [
    {"image_size": 32},
    {"patch_size": 16},
    {"image_size": 48, "patch_size": 12},
    {"image_size": 128},
]


def embedded(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return two_tower(model.eval()).embed(image, words()).image


def copied(model: nn.Module, image: Tensor, **scoring: Any) -> Tensor:
    """Embeddings of the learner copy, which must be those of the reference."""
    setting = ScoringConfig(**scoring)
    got = LearnerCopy(model, refresh_every=1, scoring=setting).embed(image, words())
    reference = ReferenceModel(clone(model), scoring=setting).embed(image, words())
    torch.testing.assert_close(got.image, reference.image, atol=1e-6, rtol=0)
    torch.testing.assert_close(got.text, reference.text, atol=1e-6, rtol=0)
    return got.image


def resized_by_open_clip(model: nn.Module, **vision: Any) -> nn.Module:
    """The weights that open_clip makes when it loads them into a model of another size."""
    from open_clip.model import resize_pos_embed
    from timm.layers import resample_patch_embed

    size = {"image_size": vision.pop("image_size", None) or 64}
    size["patch_size"] = vision.pop("patch_size", None) or 8
    resized = open_clip_model(seed=1, **size, **vision)
    state = dict(model.state_dict())
    resize_pos_embed(state, resized)
    patch = [size["patch_size"]] * 2
    state["visual.conv1.weight"] = resample_patch_embed(state["visual.conv1.weight"], patch)
    resized.load_state_dict(state)
    return resized


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_a_copy_is_what_open_clip_makes_of_the_weights(kind: str, size: dict[str, int]) -> None:
    vision = OPEN_CLIP[kind]
    model = open_clip_model(**vision)
    image = pixels(size.get("image_size", 64))
    expected = embedded(resized_by_open_clip(model, **size, **vision), image)
    torch.testing.assert_close(copied(model, image, **size), expected, atol=2e-5, rtol=0)


def test_a_real_architecture_agrees_with_force_image_size() -> None:
    import open_clip
    from open_clip.model import resize_pos_embed

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt")
    smaller = open_clip.create_model("ViT-S-32-alt", force_image_size=128)
    state = dict(model.state_dict())
    resize_pos_embed(state, smaller)
    smaller.load_state_dict(state)
    image, text = pixels(128, 2), torch.randint(1, 400, (2, 77))
    with torch.no_grad():
        expected = two_tower(smaller.eval()).embed(image, text)
    scoring = ScoringConfig(image_size=128)
    got = LearnerCopy(model, refresh_every=1, scoring=scoring).embed(image, text)
    torch.testing.assert_close(got.image, expected.image, atol=2e-5, rtol=0)
    torch.testing.assert_close(got.text, expected.text, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", TIMM)
@pytest.mark.parametrize("scale", [(0.5, 1), (1, 2), (0.75, 1.5)], ids=str)
def test_a_copy_is_what_timm_makes_of_the_weights(kind: str, scale: tuple[float, float]) -> None:
    model = timm_model(**TIMM[kind])
    patches = model.visual.trunk.patch_embed
    patch = int(patches.patch_size[0] * scale[1])
    image = int(patches.img_size[0] * scale[0]) // patch * patch
    expected = clone(model)
    expected.visual.trunk.set_input_size(img_size=(image, image), patch_size=(patch, patch))
    got = copied(model, pixels(image), image_size=image, patch_size=patch)
    torch.testing.assert_close(got, embedded(expected, pixels(image)), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_models_of_transformers_are_resized_likewise(kind: str, size: dict[str, int]) -> None:
    """Their tokens are position embedding plus patch embedding, which timm's functions resize."""
    from timm.layers import resample_abs_pos_embed, resample_patch_embed

    model: Any = transformers_model(kind)
    image, patch = size.get("image_size", 64), size.get("patch_size", 8)
    scoring = ScoringConfig(**size)
    learner_copy = LearnerCopy(model, refresh_every=1, scoring=scoring)
    module: Any = learner_copy.tower.module
    with torch.no_grad():
        theirs, mine = model.vision_model.embeddings, module.vision_model.embeddings
        num_prefix = 1 if kind == "clip" else 0
        grid = [image // patch] * 2
        positions = resample_abs_pos_embed(
            theirs.position_embedding.weight[None], grid, num_prefix_tokens=num_prefix
        )
        weight = resample_patch_embed(theirs.patch_embedding.weight, [patch, patch])
        patches = nn.functional.conv2d(
            pixels(image), weight, theirs.patch_embedding.bias, stride=patch
        )
        tokens = patches.flatten(2).transpose(1, 2)
        if num_prefix:
            tokens = torch.cat([theirs.class_embedding.expand(3, 1, -1), tokens], dim=1)
        torch.testing.assert_close(mine(pixels(image)), tokens + positions, atol=2e-5, rtol=0)
    assert copied_named(model, image, scoring).shape[0] == 3


def copied_named(model: nn.Module, image: int, scoring: ScoringConfig) -> Tensor:
    learner_copy = LearnerCopy(model, refresh_every=1, scoring=scoring)
    inputs = {"pixel_values": pixels(image)}, {"input_ids": words()}
    got = learner_copy.embed(*inputs)
    reference = ReferenceModel(clone(model), scoring=scoring).embed(*inputs)
    torch.testing.assert_close(got.image, reference.image, atol=1e-6, rtol=0)
    return got.image


def test_larger_patches_give_the_tokens_of_the_smaller_image() -> None:
    """FlexiViT's point: an image scaled up, in patches scaled up, has the tokens it had."""
    model: Any = open_clip_model()
    scoring = ScoringConfig(image_size=128, patch_size=16)
    module: Any = LearnerCopy(model, refresh_every=1, scoring=scoring).tower.module
    image = nn.functional.interpolate(pixels(8), scale_factor=2, mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(
            module.visual.conv1(image), model.visual.conv1(pixels(8)), atol=1e-4, rtol=0
        )


def fill(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and not torch.isinf(tensor).any():
                tensor.fill_(step)


LEARNERS = {
    "open_clip": lambda: open_clip_model(),
    "timm": lambda: timm_model("test_vit"),
    "clip": lambda: transformers_model("clip"),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_resampled_copy_is_never_torn(name: str) -> None:
    """Every weight holds the number of one step; resampling a constant gives the constant."""
    learner = LEARNERS[name]()
    own = 160 if name == "timm" else 64
    scoring = ScoringConfig(image_size=own // 2, token_fraction=0.5)
    fill(learner, 0)
    learner_copy = LearnerCopy(learner, refresh_every=3, scoring=scoring)
    for step in range(8):
        fill(learner, step)
        learner_copy.refresh(step)
        held = step // 3 * 3
        assert learner_copy.step == held
        for key, tensor in learner_copy.tower.module.named_parameters():
            expected = torch.full_like(tensor, held)
            torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_refreshed_copy_equals_one_made_anew(name: str) -> None:
    learner = LEARNERS[name]()
    patch = 16 if name != "timm" else 32
    scoring = ScoringConfig(patch_size=patch)
    before = {key: id(tensor) for key, tensor in learner.named_parameters()}
    learner_copy = LearnerCopy(learner, refresh_every=1, scoring=scoring)
    tensors = [tensor.data_ptr() for tensor in learner_copy.tower.module.parameters()]
    for step in range(1, 4):  # resized from the learner's weights each time, never from its own
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.mul_(0.9).add_(0.01 * step)
        learner_copy.refresh(step)
    anew = LearnerCopy(learner, refresh_every=1, scoring=scoring)
    pairs = zip(learner_copy.tower.module.parameters(), anew.tower.module.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    # In place: the copy's tensors lie where they lay.
    assert [t.data_ptr() for t in learner_copy.tower.module.parameters()] == tensors
    assert {key: id(tensor) for key, tensor in learner.named_parameters()} == before
    assert not any(parameter.requires_grad for parameter in anew.tower.module.parameters())


def test_the_learner_and_the_reference_keep_their_sizes() -> None:
    for model in (open_clip_model(), timm_model("test_vit"), transformers_model("clip")):
        before = clone(model.state_dict())
        own = 160 if "trunk" in "".join(before) else 64
        setting = ScoringConfig(image_size=own // 2, token_fraction=0.5)
        LearnerCopy(model, refresh_every=1, scoring=setting)
        reference = ReferenceModel(model, scoring=setting)
        assert reference.tower.module is not model
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        method = getattr(model, "encode_image", None) or model.get_image_features
        method(pixels(own))  # takes what it took
        assert ReferenceModel(model, scoring=ScoringConfig()).tower.module is model
        same = ReferenceModel(model, scoring=ScoringConfig(image_size=own))
        assert same.tower.module is model  # nothing to change: no copy


def test_half_precision_weights_are_resampled_in_float32() -> None:
    learner = open_clip_model()
    exact = LearnerCopy(learner, refresh_every=1, scoring=ScoringConfig(image_size=32))
    half = LearnerCopy(
        clone(learner).to(torch.bfloat16), refresh_every=1, scoring=ScoringConfig(image_size=32)
    )
    name = "visual.positional_embedding"
    expected = exact.tower.module.get_parameter(name)
    got = half.tower.module.get_parameter(name)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, atol=4e-3, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # of the caller: the copy is exact anyway
        under = LearnerCopy(learner, refresh_every=1, scoring=ScoringConfig(image_size=32))
        under.refresh(1)
    assert torch.equal(under.tower.module.get_parameter(name), expected)


def test_state_goes_through_a_checkpoint_and_back() -> None:
    scoring = ScoringConfig(image_size=32, patch_size=16, token_fraction=0.5)
    learner = open_clip_model()
    saved = LearnerCopy(learner, refresh_every=9, step=5, scoring=scoring)
    expected = saved.embed(pixels(32), words())
    buffer = io.BytesIO()
    torch.save(saved.state_dict(), buffer)
    buffer.seek(0)
    fill(learner, 3)
    resumed = LearnerCopy(learner, refresh_every=9, scoring=scoring)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.step == 5
    assert torch.equal(resumed.embed(pixels(32), words()).image, expected.image)
    other = LearnerCopy(learner, refresh_every=9, scoring=ScoringConfig(image_size=48))
    with pytest.raises(ResumeMismatchError, match="scores at another size.*image_size and patch_s"):
        other.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    "model",
    [
        lambda: open_clip_model(),
        lambda: open_clip_model(**OPEN_CLIP["attention pool"]),
        *(lambda kind=kind: timm_model(**TIMM[kind]) for kind in TIMM),
    ],
    ids=["open_clip", "open_clip attention pool", *TIMM],
)
def test_dropped_tokens_are_those_that_are_said(model: Any) -> None:
    """As the library's own patch dropout would, were it to draw these tokens."""
    from jest_stream.scoring.tokens import kept_tokens

    learner = model()
    visual = learner.visual
    trunk = getattr(visual, "trunk", visual)
    own = trunk.patch_embed.img_size[0] if hasattr(trunk, "patch_embed") else 64
    grid = trunk.patch_embed.grid_size if hasattr(trunk, "patch_embed") else (8, 8)
    got = copied(learner, pixels(own), token_fraction=0.25)
    keep = torch.tensor(kept_tokens(tuple(grid), 0.25))

    class Drawn(nn.Module):
        def forward(self, tokens: Tensor) -> Any:
            num_prefix = tokens.shape[1] - grid[0] * grid[1]
            kept = torch.cat([tokens[:, :num_prefix], tokens[:, num_prefix + keep]], dim=1)
            is_eva = type(trunk).__name__ == "Eva"
            return (kept, keep.expand(len(tokens), -1)) if is_eva else kept

    expected = clone(learner)
    if hasattr(trunk, "patch_embed"):
        expected.visual.trunk.patch_drop = Drawn()
    else:
        expected.visual.patch_dropout = Drawn()
    torch.testing.assert_close(got, embedded(expected, pixels(own)), atol=1e-6, rtol=0)
    assert not torch.allclose(got, embedded(learner, pixels(own)), atol=1e-3)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_models_drop_tokens_too(kind: str) -> None:
    model: Any = transformers_model(kind)
    scoring = ScoringConfig(token_fraction=0.25)
    learner_copy = LearnerCopy(model, refresh_every=1, scoring=scoring)
    lengths: list[int] = []
    encoder: Any = learner_copy.tower.module
    encoder = encoder.vision_model.encoder
    encoder.layers[0].register_forward_hook(
        lambda _, inputs, __: lengths.append(inputs[0].shape[1])
    )
    learner_copy.embed({"pixel_values": pixels(64)}, {"input_ids": words()})
    assert lengths == [16 + (kind == "clip")]
