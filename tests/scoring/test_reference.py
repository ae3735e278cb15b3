"""The reference is taken over: eval mode, the scoring device, its own size, never the learner.

Run: pytest tests/scoring/test_reference.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import Plain
from torch import nn

from jest_stream.errors import ConfigError
from jest_stream.scoring.reference import ReferenceModel


class Tiny(Plain):
    """A two-tower module with dropout."""

    def __init__(self, width: int = 6, dimension: int = 4) -> None:
        super().__init__(dimension)
        self.visual = nn.Sequential(nn.Linear(width, dimension), nn.Dropout())


def test_the_reference_scores_in_eval_mode_even_if_someone_calls_train():
    module = Tiny().train()
    reference = ReferenceModel(module)
    assert not module.training
    image, text = torch.randn(5, 6), torch.randn(5, 3)
    expected = reference.embed(image, text)
    module.train()  # as a trainer does with everything it owns
    got = reference.embed(image, text, micro_batch_size=2)
    torch.testing.assert_close(got.image, expected.image)
    assert not module.training


def test_weights_and_requires_grad_are_left_alone():
    module = Tiny()
    module.textual.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    ReferenceModel(module).embed(torch.randn(5, 6), torch.randn(5, 3))
    assert all(torch.equal(before[name], now) for name, now in module.state_dict().items())
    assert module.visual[0].weight.requires_grad and not module.textual.weight.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())


def test_size_and_dimension_are_the_references_own():
    reference = ReferenceModel(Tiny(width=10, dimension=7), learner=Tiny())
    assert reference.embed(torch.randn(2, 10), torch.randn(2, 3)).image.shape == (2, 7)


def test_a_reference_that_would_move_with_the_learner_is_refused():
    learner = Tiny()
    with pytest.raises(ConfigError, match="shares logit_scale with the learner.*deepcopy"):
        ReferenceModel(learner, learner=torch.compile(learner, backend="eager"))
    locked = Tiny()
    locked.textual = learner.textual
    with pytest.raises(ConfigError, match="the reference shares textual.weight with the learner"):
        ReferenceModel(locked, learner=learner)
    assert ReferenceModel(copy.deepcopy(learner), learner=learner)


def test_a_module_without_towers_is_named_as_the_reference():
    with pytest.raises(ConfigError, match="the reference, a Linear, has no encode_image"):
        ReferenceModel(nn.Linear(1, 1))


def test_repr_tells_what_and_where():
    assert repr(ReferenceModel(Tiny())) == "<ReferenceModel Tiny on cpu>"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_reference_moves_to_the_scoring_device():
    reference = ReferenceModel(Tiny(), device="cuda")
    assert reference.embed(torch.randn(2, 6), torch.randn(2, 3)).image.is_cuda
