"""Selection can be enqueued on a GPU: no value is read back, no shape depends on data.

    pytest tests/selection/test_selection_device.py

The first test needs no GPU: fake tensors have a device and shapes but no values, so that any read
of a value, such as `.item()` or `bool()`, raises.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.selection_inputs import random_embeddings
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from jest_stream.config.selection import Quota
from jest_stream.selection.baselines import independent_selection, uniform_selection
from jest_stream.selection.drawing import DrawRule
from jest_stream.selection.joint import joint_selection
from jest_stream.selection.quotas import Groups
from jest_stream.selection.sampling import gumbel_noise
from jest_stream.selection.targets import target_similarity
from jest_stream.types import Embeddings

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RULES = {
    "sigmoid": {},
    "own function": {"score": lambda a, b: a - b},
    "softmax": {"loss": "softmax"},
    "exact softmax": {"loss": "softmax", "exact_marginal": True},
    "greedy": {"rule": DrawRule(gain=float("inf"))},
    "effective support": {"rule": DrawRule(effective_support=20.0)},
    "uniform picks": {"rule": DrawRule(uniform_fraction=0.3)},
    "quotas": {"rule": DrawRule(groups=Groups(list(range(5)) * 20, {0: Quota(share=0.4)}))},
    "no reference": {"score": "hard_learner"},
    "sweeps": {"num_sweeps": 2},
    "softmax sweeps": {"num_sweeps": 1, "loss": "softmax"},
    "exact sweeps": {"num_sweeps": 1, "loss": "softmax", "exact_marginal": True},
    "sweeps within quotas": {
        "num_sweeps": 1,
        "rule": DrawRule(
            uniform_fraction=0.3, groups=Groups(list(range(5)) * 20, {0: Quota(share=0.4)})
        ),
    },
}


@pytest.mark.parametrize("rule", RULES)
def test_no_value_is_read_back_from_the_device(rule):
    with FakeTensorMode():

        def model(dtype):
            return Embeddings(
                image=torch.empty(100, 8, device="cuda", dtype=dtype),
                text=torch.empty(100, 8, device="cuda", dtype=dtype),
                logit_scale=torch.empty((), device="cuda"),
                logit_bias=torch.empty((), device="cuda"),
            )

        learner, reference = model(torch.float32), model(torch.bfloat16)
        selection = joint_selection(
            learner, reference, batch_size=20, num_chunks=3, key=0, step=0, **RULES[rule]
        )
        assert selection.indices.shape == (20,)
        for value in vars(selection).values():
            assert value.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):  # reading would have been noticed
            bool(selection.is_finite)
        if rule == "sigmoid":
            terms = DrawRule(terms=torch.empty(100, device="cuda"))
            joint_selection(learner, reference, batch_size=20, rule=terms, key=0, step=0)
            independent_selection(
                learner, reference, batch_size=20, negatives="super_batch", key=0, step=0
            )
            uniform_selection(100, batch_size=20, key=0, step=0, device=torch.device("cuda"))
            target_similarity(learner.image, torch.empty(7, 8, device="cuda"), norm=float("inf"))


def on_gpu(model):
    return replace(
        model,
        image=model.image.cuda(),
        text=model.text.cuda(),
        logit_scale=torch.tensor(model.logit_scale).cuda(),
        logit_bias=torch.tensor(model.logit_bias).cuda(),
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rule", RULES)
def test_the_gpu_chooses_as_the_cpu_does_and_never_waits(rule):
    models = random_embeddings(100, 32, seed=0), random_embeddings(100, 32, seed=1)
    arguments = {"batch_size": 20, "num_chunks": 4, "key": 3, "step": 1, **RULES[rule]}
    expected = joint_selection(*models, **arguments)
    moved = [on_gpu(model) for model in models]
    joint_selection(*moved, **arguments)  # libraries are loaded at the first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        selection = joint_selection(*moved, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert selection.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(selection.selected_score.cpu(), expected.selected_score)


@pytest.mark.gpu
@needs_gpu
def test_the_flag_tells_of_bad_values_on_the_gpu():
    models = [on_gpu(random_embeddings(50, seed=seed)) for seed in (0, 1)]
    spoiled = models[1].text.clone()
    spoiled[17, 0] = torch.inf
    selection = joint_selection(
        models[0], replace(models[1], text=spoiled), batch_size=10, key=0, step=0, num_chunks=2
    )
    assert not selection.is_finite


@pytest.mark.gpu
@needs_gpu
def test_noise_is_the_same_on_the_gpu():
    positions = torch.arange(100_000)
    cpu, gpu = (gumbel_noise(1, 2, 3, p) for p in (positions, positions.cuda()))
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-12, atol=1e-12)
