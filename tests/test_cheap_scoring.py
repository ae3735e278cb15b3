"""Cheap scoring keeps its promises in the dataset, and bad settings fail before the first batch.

pytest tests/test_cheap_scoring.py
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.leaks import no_leaks  # noqa: F401
from support.vision_models import WORDS, open_clip_model, timm_model, transformers_model
from torch import Tensor, nn

from jest_stream import JESTDataset, ScoringConfig, SelectionConfig, select_jointly
from jest_stream.demo.model import TwoTowerModel
from jest_stream.errors import ConfigError
from jest_stream.scoring.learner import LearnerCopy
from jest_stream.scoring.reference import ReferenceModel

pytestmark = pytest.mark.usefixtures("no_leaks")
GREEDY = SelectionConfig(num_chunks=4, gain=1e6)  # so that the noise of the run does not matter

SHARDS = {"num_shards": 6, "examples_per_shard": 20}


def view(size: int = 64, *, named: bool = False) -> Any:
    """A transform that gives `[3, size, size]`, or a mapping with it."""

    def transform(image: Image.Image) -> Any:
        pixels = np.asarray(image.resize((size, size)), dtype=np.float32) / 127.5 - 1
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        return {"pixel_values": tensor} if named else tensor

    return transform


def tokenize(text: str) -> Tensor:
    return torch.tensor([2 + ord(letter) % 60 for letter in text.ljust(WORDS)[:WORDS]])


def jest(shards: Any, **options: Any) -> JESTDataset:
    """Batches of 6 out of 18 at 64 px, chosen by two small CLIPs of open_clip."""
    defaults = {
        "learner": open_clip_model(seed=1),
        "reference": open_clip_model(seed=2),
        "transform": view(),
        "tokenizer": tokenize,
        "batch_size": 6,
        "super_batch_size": 18,
        "selection": GREEDY,
        "as_dict": True,
    }
    return JESTDataset(shards, **{**defaults, **options})


def first(dataset: JESTDataset, num_batches: int = 1) -> list[Any]:
    with dataset:
        return list(islice(dataset, num_batches))


SETTINGS: list[dict[str, Any]] = [
    {"image_size": 32},
    {"patch_size": 16},
    {"token_fraction": 0.25},
    {"image_size": 32, "patch_size": 16, "token_fraction": 0.5},
    {"image_size": 32, "autocast_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_what_is_handed_out_is_what_the_cheap_scores_choose(
    shards: list[str], setting: dict[str, Any]
) -> None:
    """The whole path, by hand: same candidates, same small views, same embeddings, same choice."""
    scoring = ScoringConfig(**setting)
    uniform = SelectionConfig(method="uniform")
    (candidates,) = first(jest(shards, batch_size=18, selection=uniform))
    learner, reference = open_clip_model(seed=1), open_clip_model(seed=2)
    (batch,) = first(jest(shards, learner=learner, reference=reference, scoring=scoring))
    side = setting.get("image_size", 64)
    images = nn.functional.interpolate(
        candidates["image"], size=(side, side), mode="bicubic", antialias=True
    )
    inputs = (candidates["image"] if side == 64 else images), candidates["text"]
    kind = {"autocast_dtype": scoring.autocast_dtype}
    selected = select_jointly(
        LearnerCopy(learner, refresh_every=1, scoring=scoring).embed(*inputs, **kind),
        ReferenceModel(reference, scoring=scoring).embed(*inputs, **kind),
        batch_size=6,
        num_chunks=4,
        gain=1e6,
        loss="softmax",
    )
    assert batch["key"] == [candidates["key"][i] for i in selected.tolist()]
    assert batch["image"].shape == (6, 3, 64, 64)  # the learner trains at its own size


def test_every_run_chooses_the_same(shards: list[str]) -> None:
    scoring = ScoringConfig(image_size=32, token_fraction=0.5)
    plain = SelectionConfig(num_chunks=4)
    runs = [first(jest(shards, scoring=scoring, selection=plain), 4) for _ in range(2)]
    keys = [[batch["key"] for batch in run] for run in runs]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("setting", [{}, *SETTINGS], ids=str)
def test_easy_reference_needs_no_copy_and_no_learner_pass(
    shards: list[str], setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a learner copy was made")

    monkeypatch.setattr("jest_stream.pipeline.embedder.LearnerCopy", refuse)
    learner = open_clip_model(seed=1)
    learner.register_forward_pre_hook(refuse)
    for module in learner.modules():
        module.register_forward_pre_hook(refuse)
    easy = SelectionConfig(score="easy_reference")
    options: dict[str, Any] = {"selection": easy, "scoring": ScoringConfig(**setting)}
    with jest(shards, learner=learner, **options) as dataset:
        with_learner = list(islice(dataset, 3))
        assert "learner copy" not in repr(dataset)
    without = first(jest(shards, learner=None, **options), 3)
    assert [batch["key"] for batch in with_learner] == [batch["key"] for batch in without]


def test_resuming_with_a_resampled_copy_repeats_the_run(shards: list[str]) -> None:
    options: dict[str, Any] = {
        "scoring": ScoringConfig(image_size=32, patch_size=16),
        "refresh_every": 4,
        "selection": SelectionConfig(num_chunks=4),
    }

    def train(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)

    learner, keys, states = open_clip_model(seed=1), [], []
    with jest(shards, learner=learner, **options) as dataset:
        for batch in islice(dataset, 7):
            keys.append(batch["key"])
            train(learner)
            weights = {name: value.clone() for name, value in learner.state_dict().items()}
            states.append((dataset.state_dict(include_learner_copy=True), weights))
    state, weights = states[2]  # between two refreshes
    learner = open_clip_model(seed=1)
    learner.load_state_dict(weights)
    with jest(shards, learner=learner, **options) as resumed:
        resumed.load_state_dict(state)
        for expected, batch in zip(keys[3:], resumed, strict=False):
            assert batch["key"] == expected
            train(learner)


def test_a_model_that_takes_any_size_gets_the_smaller_view(shards: list[str]) -> None:
    """The demo's model: no known vision transformer, so the view is scaled and that is all."""
    sizes: list[int] = []

    class Watched(TwoTowerModel):
        def encode_image(self, images: Tensor) -> Tensor:
            sizes.append(images.shape[-1])
            return super().encode_image(images)

    torch.manual_seed(0)
    models = {"learner": Watched(width=32), "reference": Watched(width=32)}
    transform = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)  # noqa: E731
    scoring = ScoringConfig(image_size=16)
    (batch,) = first(jest(shards, **models, transform=transform, scoring=scoring))
    assert set(sizes) == {16} and batch["image"].shape == (6, 3, 32, 32)
    with pytest.raises(ConfigError, match="patch_size=16, but the learner's.*a VisionTransformer"):
        first(jest(shards, **models, transform=transform, scoring=ScoringConfig(patch_size=16)))


def towers() -> dict[str, Any]:
    return {
        "open_clip": (open_clip_model, 64, False),
        "timm": (lambda: timm_model("test_vit3", pool="map"), 160, False),
        "transformers": (lambda: transformers_model("siglip"), 64, True),
    }


@pytest.mark.parametrize("name", towers())
def test_a_view_of_another_size_says_what_to_set(shards: list[str], name: str) -> None:
    build, own, named = towers()[name]
    size = own // 2
    options: dict[str, Any] = {"learner": build(), "reference": build()}
    if named:
        options["tokenizer"] = lambda text: {"input_ids": tokenize(text)}
    small = {**options, "transform": view(size, named=named)}
    message = f"the learner takes images of {own} x {own} pixels, but the score view that transform"
    message += f" gives is {size} x {size} pixels. Pass scoring=ScoringConfig.image_size={size}."
    with pytest.raises(ConfigError, match=message):
        first(jest(shards, **small))
    first(jest(shards, **small, scoring=ScoringConfig(image_size=size)))  # as it says
    large = {**options, "transform": view(own + 32, named=named)}
    with pytest.raises(ConfigError, match=f"image_size={own}. to scale the score view down"):
        first(jest(shards, **large))
    first(jest(shards, **large, scoring=ScoringConfig(image_size=own)))
    reference = {**small, "selection": SelectionConfig(score="easy_reference")}
    with pytest.raises(ConfigError, match="the reference takes images of"):
        first(jest(shards, **reference))


def test_a_view_that_is_too_small_is_refused(shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="image_size=64, but the score view.*is 32 x 32 pixels"):
        first(jest(shards, transform=view(32), scoring=ScoringConfig(image_size=64)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 36}, "images of 36 x 36 pixels in patches of 8 x 8.*image_size=32 or 40"),
        ({"patch_size": 12}, "64 x 64 pixels in patches of 12 x 12.*=60 or 72.*a smaller patch_s"),
        ({"patch_size": 128}, "64 x 64 pixels in patches of 128 x 128 pixels, which do not divide"),
        ({"patch_size": 4}, "scoring.patch_size=4 is below the learner's own, 8.*cost more than"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(
    shards: list[str], setting: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        first(jest(shards, scoring=ScoringConfig(**setting)))


def resnet() -> nn.Module:
    import open_clip

    vision = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 16, "head_width": 16}
    text = {"context_length": WORDS, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(32, vision, text).eval()


def two_vits() -> nn.Module:
    model: Any = open_clip_model()
    model.other = open_clip_model().visual
    return model


def hybrid() -> nn.Module:
    return timm_model("vit_tiny_r_s16_p8_224", depth=1)


@pytest.mark.parametrize(
    ("build", "setting", "message"),
    [
        (resnet, {"image_size": 32}, "learner could not embed images of 32 x 32.*made for 64 x 64"),
        (resnet, {"patch_size": 16}, "patch_size=16, but.*a ModifiedResNet, is no vision trans"),
        (
            resnet,
            {"token_fraction": 0.5},
            "token_fraction=0.5, but.*ModifiedResNet.*image_size inst",
        ),
        (lambda: timm_model("test_convnext"), {"token_fraction": 0.5}, "a ConvNeXt, is no vision"),
        (two_vits, {"image_size": 32}, "has 2 vision transformers, 'visual' and 'other'"),
        (hybrid, {"token_fraction": 0.5}, "image tower, a VisionTransformer.*position embeddings"),
    ],
    ids=["resnet size", "resnet patch", "resnet tokens", "convnext", "two", "hybrid"],
)
def test_models_that_cannot_are_refused_with_the_reason(
    shards: list[str], build: Any, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        first(jest(shards, learner=build(), scoring=ScoringConfig(**setting)))


def test_a_convnext_takes_the_smaller_view_by_itself(shards: list[str]) -> None:
    models = {"learner": timm_model("test_convnext"), "reference": timm_model("test_convnext")}
    first(jest(shards, **models, scoring=ScoringConfig(image_size=32)))


def test_an_error_of_the_models_own_is_not_blamed_on_the_size(shards: list[str]) -> None:
    class Broken(TwoTowerModel):
        def encode_text(self, tokens: Tensor) -> Tensor:
            raise RuntimeError("out of words")

    with pytest.raises(RuntimeError, match="^out of words"):
        first(jest(shards, learner=Broken(), reference=TwoTowerModel()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"image_size": 0}, "scoring.image_size must be an integer of at least 1, got 0"),
        ({"image_size": 32.0}, "scoring.image_size must be an integer"),
        ({"patch_size": True}, "scoring.patch_size must be an integer"),
        ({"token_fraction": 0}, r"scoring.token_fraction must be in \(0, 1\], got 0"),
        ({"token_fraction": 1.5}, r"scoring.token_fraction must be in \(0, 1\], got 1.5"),
        ({"token_fraction": "half"}, "scoring.token_fraction must be a number, got 'half'"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScoringConfig(**setting)
