"""Fingerprints tell apart what matters and nothing else.

pytest tests/reference_cache/test_fingerprints.py
"""

from __future__ import annotations

import copy
import json
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor, tokenize
from support.vision_models import DIMENSION, TEXT, VISION, timm_model
from torch import nn
from torchvision import transforms

from jest_stream.errors import ConfigError
from jest_stream.reference_cache.fingerprints import (
    tokenizer_fingerprint,
    transform_fingerprint,
    view_difference,
    weights_fingerprint,
)

pytestmark = pytest.mark.usefixtures("no_leaks")

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def compose(
    size: int = 32,
    interpolation: Any = transforms.InterpolationMode.BICUBIC,
    mean: tuple[float, ...] = MEAN,
    *more: Any,
) -> Any:
    return transforms.Compose(
        [
            transforms.Resize(size, interpolation),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, STD),
            *more,
        ]
    )


@pytest.mark.parametrize("name", ["open_clip", "timm"])
def test_one_set_of_weights_is_two_models_with_two_activations(name: str) -> None:
    def model(activation: type[nn.Module]) -> nn.Module:
        if name == "timm":
            return timm_model("test_vit", act_layer=activation)
        torch.manual_seed(0)
        quick = activation is not nn.GELU
        return open_clip.CLIP(DIMENSION, VISION, TEXT, quick_gelu=quick)

    plain, again, quick = model(nn.GELU), model(nn.GELU), model(QuickGELU)
    state = plain.state_dict()
    assert all(torch.equal(state[key], value) for key, value in quick.state_dict().items())
    assert weights_fingerprint(plain) == weights_fingerprint(again) != weights_fingerprint(quick)


def test_weights_are_told_apart_by_names_shapes_types_and_values() -> None:
    model = TinyTwoTower(1)
    known = weights_fingerprint(model)
    assert weights_fingerprint(copy.deepcopy(model)) == known
    assert weights_fingerprint(torch.compile(model)) == known
    assert weights_fingerprint(model.requires_grad_(False).train()) == known
    with torch.no_grad():
        changed = copy.deepcopy(model)
        changed.words[3, 3] = torch.nextafter(changed.words[3, 3], torch.tensor(9.0))
    others = [
        changed,
        TinyTwoTower(2),
        TinyTwoTower(1, has_bias=False),
        copy.deepcopy(model).half(),
    ]
    renamed = nn.Module()
    renamed.register_parameter("x", nn.Parameter(model.image.detach().clone()))
    named = [weights_fingerprint(other) for other in [*others, renamed]]
    assert len({known, *named}) == 6
    assert weights_fingerprint(copy.deepcopy(model).bfloat16()) not in named


def test_equal_views_do_not_differ_and_survive_json() -> None:
    found = transform_fingerprint(compose())
    again = json.loads(json.dumps(transform_fingerprint(compose())))
    assert view_difference(again, found) == ""
    words = tokenizer_fingerprint(tokenize)
    assert view_difference(json.loads(json.dumps(words)), words) == ""
    assert view_difference([], []) == ""


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (compose(40), r"the shape was \[3, 32, 32\], is \[3, 40, 40\]"),
        (compose(32, transforms.InterpolationMode.BILINEAR), "a value of image was"),
        (compose(32, transforms.InterpolationMode.BICUBIC, (0.5, 0.46, 0.41)), "a value of image"),
        (lambda image: compose()(image).half(), "the dtype was float32, is float16"),
        (lambda image: compose()(image.rotate(1)), "a value of image"),
        (lambda image: {"pixels": compose()(image)}, "the name was image, is image/pixels"),
        (lambda image: 1 / 0, "was image .*, is a ZeroDivisionError"),
    ],
)
def test_another_transform_is_told_by_what_it_gives(other: Any, message: str) -> None:
    difference = view_difference(transform_fingerprint(compose()), transform_fingerprint(other))
    assert difference.startswith("for the image of ")
    import re

    assert re.search(message, difference)


def test_rounding_of_another_version_is_no_difference() -> None:
    almost = transform_fingerprint(lambda image: compose()(image) + 1e-4)
    assert view_difference(transform_fingerprint(compose()), almost) == ""


@pytest.mark.parametrize(
    "other",
    [
        lambda text: tokenize(text.lower()),
        lambda text: tokenize(text[:60]),
        lambda text: tokenize(text.encode("ascii", "ignore").decode()),
        lambda text: tokenize(text or "empty"),
    ],
    ids=["lower case", "cut", "ascii only", "other padding"],
)
def test_another_tokenizer_is_told_by_what_it_gives(other: Any) -> None:
    def words(text: str) -> torch.Tensor:
        return torch.tensor(list(text.encode()[:200].ljust(200)))

    known = tokenizer_fingerprint(words)
    assert view_difference(known, tokenizer_fingerprint(lambda text: words(text))) == ""
    assert view_difference(tokenizer_fingerprint(tokenize), tokenizer_fingerprint(other)) or (
        view_difference(known, tokenizer_fingerprint(lambda text: words(text[:60])))
    )


def test_a_view_that_draws_at_random_is_refused_and_the_state_put_back() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match="cannot be cached.*preprocess_val"):
        transform_fingerprint(lambda image: to_tensor(image) + torch.rand(()))
    with pytest.raises(ConfigError, match="the tokenizer of the reference gives something else"):
        tokenizer_fingerprint(lambda text: torch.randint(9, (4,)))
    assert torch.equal(torch.get_rng_state(), before)
