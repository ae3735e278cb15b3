"""Models and inputs that cannot be scored are refused in words that tell the way out.

Run: pytest tests/scoring/test_refused_models.py
"""

from __future__ import annotations

import pytest
import torch
from support.models import Plain
from torch import Tensor, nn

from jest_stream.errors import ConfigError
from jest_stream.scoring.two_tower import embed_in_micro_batches, two_tower


def test_missing_methods_are_named_with_what_is_accepted():
    class ImagesOnly(Plain):
        encode_text = None

    with pytest.raises(ConfigError, match="Linear, has no encode_image and encode_text.*open_clip"):
        two_tower(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="reference, a ImagesOnly, has no encode_text, so"):
        two_tower(ImagesOnly(), role="reference")
    with pytest.raises(ConfigError, match="learner must be a torch.nn.Module, got <class 'str'>"):
        two_tower("ViT-B-32")

    class LanguageModel(nn.Module):
        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            return pixel_values

    with pytest.raises(ConfigError, match="has no get_text_features, so"):
        two_tower(LanguageModel())


def test_a_scale_that_would_not_be_copied_with_the_module_is_refused():
    model = Plain()
    del model.logit_scale
    with pytest.raises(ConfigError, match="has no logit_scale; it must be a parameter or buffer"):
        two_tower(model)
    model.logit_scale = 2.6
    with pytest.raises(ConfigError, match="has <class 'float'> as its logit_scale.*register_buf"):
        two_tower(model)
    model.logit_scale = torch.tensor(2.6)
    with pytest.raises(ConfigError, match="<class 'torch.Tensor'> as its logit_scale"):
        two_tower(model)
    del model.logit_scale
    model.register_buffer("logit_scale", torch.zeros(3))
    with pytest.raises(ConfigError, match=r"logit_scale of the learner has shape \[3\]"):
        two_tower(model)


def test_towers_that_do_not_fit_are_refused_with_their_shapes():
    model = Plain()
    tower = two_tower(model)
    model.textual = nn.Linear(3, 5)
    with pytest.raises(ConfigError, match=r"shape \[2, 4\] and text embeddings of shape \[2, 5\]"):
        embed_in_micro_batches(tower, torch.ones(2, 6), torch.ones(2, 3))
    with pytest.raises(
        ConfigError, match=r"encode_image of the learner returned shape \[2, 7, 4\]"
    ):
        embed_in_micro_batches(tower, torch.ones(2, 7, 6), torch.ones(2, 3))


def test_inputs_without_one_row_per_example_are_refused():
    tower = two_tower(Plain())
    with pytest.raises(ConfigError, match="given 3 images and 2 texts"):
        embed_in_micro_batches(tower, torch.ones(3, 6), torch.ones(2, 3))
    with pytest.raises(ConfigError, match="text input of the learner must be.*{'text': None}"):
        embed_in_micro_batches(tower, torch.ones(2, 6), ["a", "b"])
    uneven = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(3, 3)}
    with pytest.raises(ConfigError, match="'input_ids': 2, 'attention_mask': 3"):
        embed_in_micro_batches(tower, torch.ones(2, 6), uneven)
