"""The learner copy equals the learner at the promised step, and the learner is only read.

Run: pytest tests/scoring/test_learner.py
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from jest_stream.errors import ConfigError, ResumeMismatchError
from jest_stream.scoring.learner import LearnerCopy


class Learner(nn.Module):
    """Two towers with a batch norm, so that there are buffers, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)
        )
        self.textual = nn.Linear(3, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.textual(text)


def fill(learner: nn.Module, value: int) -> None:
    """Sets every parameter and buffer to the step number."""
    with torch.no_grad():
        for tensor in [*learner.parameters(), *learner.buffers()]:
            tensor.fill_(value)


def values(learner_copy: LearnerCopy) -> set[float]:
    """Every number that the copy holds."""
    module = learner_copy.tower.module
    return {
        number
        for tensor in [*module.parameters(), *module.buffers()]
        for number in tensor.flatten().tolist()
    }


def inputs(num_rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(num_rows, 6, generator=generator),
        torch.randn(num_rows, 3, generator=generator),
    )


@pytest.mark.parametrize(
    ("refresh_every", "held"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6]),
        (2, [0, 0, 2, 2, 4, 4, 6]),
        (3, [0, 0, 0, 3, 3, 3, 6]),
        (9, [0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_the_copy_holds_the_weights_of_the_promised_step(refresh_every: int, held: list[int]):
    learner = Learner()
    fill(learner, 0)
    learner_copy = LearnerCopy(learner, refresh_every=refresh_every)
    for step in range(7):
        fill(learner, step)  # as the optimizer's step would
        was_copied = learner_copy.refresh(step)
        assert values(learner_copy) == {held[step]}  # one value: never torn
        assert learner_copy.step == held[step]
        assert was_copied == (step > 0 and step % refresh_every == 0)


def test_a_promised_step_that_was_passed_over_is_made_up_for():
    learner = Learner()
    fill(learner, 0)
    learner_copy = LearnerCopy(learner, refresh_every=4)
    held = []
    for step in (1, 3, 6, 7, 9):  # no scoring at 4 and 8
        fill(learner, step)
        learner_copy.refresh(step)
        held.append(learner_copy.step)
    assert held == [0, 0, 6, 6, 9]


def test_a_forced_refresh_copies_at_any_step():
    learner = Learner()
    learner_copy = LearnerCopy(learner, refresh_every=10)
    fill(learner, 7)
    assert learner_copy.refresh(7, force=True)
    assert values(learner_copy) == {7.0}
    assert learner_copy.step == 7


def test_scores_are_those_of_the_learner_in_eval_mode():
    learner = Learner().train()
    for _ in range(3):
        learner.encode_image(torch.randn(8, 6))  # moves the running statistics
    learner_copy = LearnerCopy(learner, refresh_every=1)
    got = learner_copy.embed(*inputs(), micro_batch_size=3)
    with torch.no_grad():
        expected = nn.functional.normalize(copy.deepcopy(learner).eval().visual(inputs()[0]))
    torch.testing.assert_close(got.image, expected)
    torch.testing.assert_close(got.logit_scale, torch.tensor(1.0).exp())
    torch.testing.assert_close(got.logit_bias, torch.tensor(-2.0))


def test_embeddings_in_use_do_not_change_with_a_refresh():
    learner = Learner()
    learner_copy = LearnerCopy(learner, refresh_every=1)
    got = learner_copy.embed(*inputs())
    before = copy.deepcopy(got)
    fill(learner, 5)
    learner_copy.refresh(1)
    assert torch.equal(got.image, before.image)
    assert torch.equal(got.logit_scale, before.logit_scale)
    assert torch.equal(got.logit_bias, before.logit_bias)


def test_the_learner_is_only_read():
    learner = Learner().train()
    learner.visual[0].weight.requires_grad_(False)
    calls: list[str] = []
    learner.textual.weight.register_hook(lambda _: calls.append("backward"))
    loss = learner.encode_image(inputs()[0]).sum() + learner.encode_text(inputs()[1]).sum()
    loss.backward()
    before = copy.deepcopy(learner.state_dict())
    grads = {name: p.grad for name, p in learner.named_parameters()}
    clones = {name: None if g is None else g.clone() for name, g in grads.items()}

    learner_copy = LearnerCopy(learner, refresh_every=1)
    learner_copy.embed(*inputs())
    learner_copy.refresh(1)

    assert all(torch.equal(before[name], now) for name, now in learner.state_dict().items())
    assert all(module.training for module in learner.modules())
    for name, parameter in learner.named_parameters():
        assert parameter.requires_grad == (name != "visual.0.weight")
        assert parameter.grad is grads[name]
        assert parameter.grad is None or torch.equal(parameter.grad, clones[name])
    assert calls == ["backward"]
    learner.encode_text(inputs()[1]).sum().backward()
    assert calls == ["backward", "backward"]


def test_the_copy_takes_no_gradients_and_is_in_eval_mode():
    module = LearnerCopy(Learner().train(), refresh_every=1).tower.module
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(child.training for child in module.modules())


def test_the_global_random_state_is_untouched():
    learner = Learner()
    before = torch.get_rng_state()
    learner_copy = LearnerCopy(learner, refresh_every=1)
    learner_copy.embed(*inputs())
    learner_copy.refresh(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_learner_converted_after_the_copy_is_still_followed():
    learner = Learner()
    learner_copy = LearnerCopy(learner, refresh_every=1)
    fill(learner.double(), 3)
    learner_copy.refresh(1)
    assert values(learner_copy) == {3.0}
    assert learner_copy.tower.module.textual.weight.dtype == torch.float32


def test_weights_replaced_by_new_tensors_are_followed():
    learner = Learner()
    learner_copy = LearnerCopy(learner, refresh_every=1)
    state = {name: torch.full_like(tensor, 4) for name, tensor in learner.state_dict().items()}
    learner.load_state_dict(state, assign=True)
    learner_copy.refresh(1)
    assert values(learner_copy) == {4.0}


def test_tied_weights_stay_tied():
    learner = Learner()
    learner.extra = nn.Linear(3, 4)
    learner.extra.weight = learner.textual.weight
    learner_copy = LearnerCopy(learner, refresh_every=1)
    fill(learner, 2)
    learner_copy.refresh(1)
    module = learner_copy.tower.module
    assert module.extra.weight is module.textual.weight
    assert values(learner_copy) == {2.0}


def test_wrapped_learners_are_copied_without_the_wrapper(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        learner = Learner()
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(learner), backend="eager")
        learner_copy = LearnerCopy(wrapped, refresh_every=1)
        assert type(learner_copy.tower.module) is Learner
        fill(learner, 3)
        learner_copy.refresh(1)
        assert values(learner_copy) == {3.0}
    finally:
        dist.destroy_process_group()


def test_layers_compiled_before_or_after_the_copy_are_followed():
    learner = Learner()
    learner.textual = torch.compile(learner.textual, backend="eager")
    learner.encode_text(inputs()[1])  # compiled by now
    learner_copy = LearnerCopy(learner, refresh_every=1)
    learner_copy.embed(*inputs())
    learner.visual = torch.compile(learner.visual, backend="eager")
    fill(learner, 6)
    learner_copy.refresh(1)
    assert values(learner_copy) == {6.0}


def test_a_lazy_learner_is_copied_once_it_has_shapes():
    learner = Learner()
    learner.textual = nn.LazyLinear(4)
    with pytest.raises(ConfigError, match="textual.weight of the learner has no values yet.*forw"):
        LearnerCopy(learner, refresh_every=1)
    learner.encode_text(inputs()[1])
    learner_copy = LearnerCopy(learner, refresh_every=1)
    fill(learner, 1)
    learner_copy.refresh(1)
    assert values(learner_copy) == {1.0}
    with pytest.raises(ConfigError, match="the meta device"):
        LearnerCopy(Learner().to("meta"), refresh_every=1)


def test_a_copy_made_under_inference_mode_can_be_refreshed_later():
    learner = Learner()
    with torch.inference_mode():
        learner_copy = LearnerCopy(learner, refresh_every=1)
        learner_copy.embed(*inputs())
    fill(learner, 8)
    learner_copy.refresh(1)
    assert values(learner_copy) == {8.0}


def test_state_goes_through_a_checkpoint_and_back():
    learner = Learner()
    fill(learner, 5)
    saved = LearnerCopy(learner, refresh_every=4, step=5)
    state = saved.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    fill(learner, 9)
    saved.refresh(8)  # the saved state does not change with the copy
    buffer.seek(0)

    resumed = LearnerCopy(learner, refresh_every=4)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert values(resumed) == {5.0}
    assert resumed.step == 5
    resumed.load_state_dict(state)
    assert values(resumed) == {5.0}


def test_a_state_of_another_module_is_refused():
    learner_copy = LearnerCopy(Learner(), refresh_every=1)
    other = Learner()
    other.textual = nn.Linear(3, 4, bias=False)
    state = LearnerCopy(other, refresh_every=1).state_dict()
    with pytest.raises(ResumeMismatchError, match="another module.*it lacks textual.bias"):
        learner_copy.load_state_dict(state)
    with pytest.raises(ResumeMismatchError, match="has version 0, this release reads version 1"):
        learner_copy.load_state_dict({**state, "version": 0})


def test_a_learner_whose_layers_changed_is_refused_and_the_copy_kept():
    learner = Learner()
    fill(learner, 1)
    learner_copy = LearnerCopy(learner, refresh_every=1)
    fill(learner, 2)
    learner.textual = nn.Linear(5, 4)
    with pytest.raises(ConfigError, match=r"textual.weight was \[4, 3\], is \[4, 5\].*new dataset"):
        learner_copy.refresh(1)
    learner.textual = nn.Identity()
    learner.adapter = nn.Linear(1, 1)
    with pytest.raises(
        ConfigError,
        match="it lacks textual.weight, textual.bias; it has also adapter.weight, adapter.bias",
    ):
        learner_copy.refresh(1)
    assert values(learner_copy) == {1.0}
    assert learner_copy.step == 0


def test_a_learner_that_cannot_be_copied_says_why():
    learner = Learner()
    learner.last = learner.encode_image(inputs()[0])  # a kept activation, part of a graph
    with pytest.raises(ConfigError, match="the learner, a Learner, cannot be copied.*detach it"):
        LearnerCopy(learner, refresh_every=1)


def test_a_sharded_learner_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        learner = Learner()
        learner.logit_scale = nn.Parameter(torch.ones(1))  # fully_shard takes no scalars
        learner.logit_bias = nn.Parameter(torch.ones(1))
        fully_shard(learner)
        with pytest.raises(ConfigError, match="of the learner is sharded.*DistributedDataPar"):
            LearnerCopy(learner, refresh_every=1)
    finally:
        dist.destroy_process_group()


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="refresh_every must be at least 1 step, got 0"):
        LearnerCopy(Learner(), refresh_every=0)
    with pytest.raises(ConfigError, match="the learner, a Linear, has no encode_image"):
        LearnerCopy(nn.Linear(1, 1), refresh_every=1)


def test_repr_tells_the_live_state():
    learner_copy = LearnerCopy(Learner(), refresh_every=4)
    learner_copy.refresh(8)
    assert repr(learner_copy) == (
        "<LearnerCopy of Learner, weights of step 8, refreshed every 4 on cpu>"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("learner_device", "copy_device"), [("cuda", "cuda"), ("cpu", "cuda")])
def test_the_copy_follows_across_devices(learner_device: str, copy_device: str):
    learner = Learner().to(learner_device)
    learner_copy = LearnerCopy(learner, refresh_every=1, device=copy_device)
    for step in range(50):
        fill(learner, step)
        learner_copy.refresh(step)
        assert values(learner_copy) == {float(step)}
    assert learner_copy.embed(*inputs()).image.is_cuda
