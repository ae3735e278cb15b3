"""Every run reports its true cost, which is counted by hand here, on real models and shards.

pytest tests/metrics/test_accounting.py
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from dataclasses import FrozenInstanceError
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, flipped, to_tensor, tokenize
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from jest_stream import (
    JESTDataset,
    ReferenceCache,
    RunCost,
    ScoringConfig,
    SelectionConfig,
    TargetSimilarity,
    training_flops,
)
from jest_stream.errors import ConfigError
from jest_stream.metrics.metrics import shared_out
from jest_stream.scoring.learner import embed_once

pytestmark = pytest.mark.usefixtures("no_leaks")

WIDTH, LAYERS, DIMENSION, WORDS, VOCABULARY = 32, 2, 24, 4, 64
FLOPS = ("training", "learner_scoring", "reference_scoring", "selection")


def vit(seed: int = 0, *, image_size: int = 32, dimension: int = DIMENSION) -> nn.Module:
    """A real open_clip model for the sigmoid loss; patches of 8 px."""
    import open_clip

    vision = {"layers": LAYERS, "width": WIDTH, "head_width": 16}
    vision |= {"image_size": image_size, "patch_size": 8}
    text = {"context_length": WORDS, "vocab_size": VOCABULARY, "width": WIDTH}
    text |= {"heads": 2, "layers": LAYERS}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.CLIP(dimension, vision, text, init_logit_bias=-10.0)


def forward_by_hand(*, image_size: int = 32, dimension: int = DIMENSION) -> int:
    """FLOPs of one pair through both towers."""
    num_patches = (image_size // 8) ** 2
    patches = 2 * num_patches * (3 * 8 * 8) * WIDTH
    tokens = (1 + num_patches, WORDS)
    blocks = sum(2 * LAYERS * (12 * n * WIDTH**2 + 2 * n**2 * WIDTH) for n in tokens)
    return patches + blocks + 2 * (2 * WIDTH * dimension)


def pixels(image: Image.Image) -> Tensor:
    return pil_to_tensor(image.resize((32, 32))).float() / 255


def half_pixels(image: Image.Image) -> Tensor:
    return pil_to_tensor(image.resize((16, 16))).float() / 255


SHARDS = {"num_shards": 4, "examples_per_shard": 64}


def jest(shards: Any, learner: nn.Module | None = None, **options: Any) -> JESTDataset:
    defaults = {
        "reference": None if learner is None else vit(7),
        "transform": pixels,
        "tokenizer": tokenize,
        "batch_size": 8,
        "filter_ratio": 0.5,
    }
    return JESTDataset(shards, learner=learner, **{**defaults, **options})


def flops_of(dataset: JESTDataset) -> tuple[float, ...]:
    metrics = dataset.metrics()
    return tuple(metrics[f"flops_{name}"] for name in FLOPS)


def test_three_steps_with_a_schedule_agree_with_a_table_worked_by_hand(shards: list[str]) -> None:
    selection = SelectionConfig(num_chunks=4)  # 2 examples a chunk; 6 of 8 condition others
    options = {"filter_ratio": {0: 0.5, 2: 0.75}, "lookahead": 0, "selection": selection}
    forward, large = forward_by_hand(), forward_by_hand(dimension=40)
    with jest(shards, vit(), reference=vit(1, dimension=40), **options) as dataset:
        assert flops_of(dataset) == (0, 0, 0, 0)
        table = []
        for _, _ in zip(range(3), dataset, strict=False):
            metrics = dataset.metrics()
            samples = [metrics[f"samples_{name}"] for name in ("read", "scored", "trained")]
            table.append((*samples, *flops_of(dataset)))
    pair = 4 * (DIMENSION + 40)
    #  read, scored, trained, training, learner, reference, selection
    assert table == [
        (16, 16, 8, 8 * 3 * forward, 16 * forward, 16 * large, 16 * 6 * pair),
        (32, 32, 16, 16 * 3 * forward, 32 * forward, 32 * large, 32 * 6 * pair),
        (64, 64, 24, 24 * 3 * forward, 64 * forward, 64 * large, 64 * 6 * pair),
    ]
    total = 72 * forward + 64 * forward + 64 * large + 64 * 6 * pair
    assert metrics["flops_ratio"] == pytest.approx(total / (72 * forward))
    # In the paper's count the 24 that are trained on are not passed through twice.
    reused = (total - 24 * forward) / (72 * forward)
    assert metrics["flops_ratio_with_reuse"] == pytest.approx(reused)


def test_what_is_in_flight_is_paid_for_already(shards: list[str]) -> None:
    with jest(shards, vit(), lookahead=2) as dataset:
        next(iter(dataset))
        metrics = dataset.metrics()
    assert (metrics["samples_read"], metrics["samples_scored"]) == (16, 48)
    assert metrics["flops_learner_scoring"] == 48 * forward_by_hand()
    assert metrics["flops_training"] == 8 * 3 * forward_by_hand()


def test_steps_without_selection_pay_for_training_alone(shards: list[str]) -> None:
    forward = forward_by_hand()
    selection = SelectionConfig(start_step=1, stop_step=2, num_chunks=1)
    with jest(shards, vit(), lookahead=0, selection=selection) as dataset:
        stream = iter(dataset)
        found = []
        for _ in range(3):
            next(stream)
            found.append((*flops_of(dataset), dataset.metrics()["flops_ratio_with_reuse"]))
    scored = 16 * forward
    assert found[0] == (24 * forward, 0, 0, 0, 1.0)
    assert found[1][:4] == (48 * forward, scored, scored, 0)  # one chunk conditions nothing
    assert found[2][:4] == (72 * forward, scored, scored, 0)
    assert found[2][4] == pytest.approx((72 + 16 + 16 - 8) / 72)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        # Examples that 16 candidates are conditioned on, dimensions of the models that count.
        (SelectionConfig(num_chunks=4, num_sweeps=2), 4 * 16 * (8 * 3 - 2) * 48),
        (SelectionConfig(score="easy_reference"), 4 * 16 * 7 * 24),
        (SelectionConfig(score="hard_learner"), 4 * 16 * 7 * 24),
        (SelectionConfig(method="independent"), 0),
        (
            SelectionConfig(
                score="hard_learner",
                method="independent",
                terms=(TargetSimilarity(targets=torch.ones(5, DIMENSION)),),
            ),
            2 * 16 * 5 * 24,
        ),
    ],
)
def test_the_choice_is_paid_for_by_its_products(
    shards: list[str], selection: SelectionConfig, expected: int
) -> None:
    with jest(shards, vit(), lookahead=0, selection=selection) as dataset:
        next(iter(dataset))
        assert dataset.metrics()["flops_selection"] == expected


def test_scores_without_a_model_do_not_pay_for_it(shards: list[str]) -> None:
    forward = forward_by_hand()
    easy = SelectionConfig(score="easy_reference", num_chunks=1)
    with jest(shards, vit(), lookahead=0, selection=easy) as dataset:
        next(iter(dataset))
        assert flops_of(dataset) == (24 * forward, 0, 16 * forward, 0)
        cost = dataset.cost()
    assert cost.flops.ratio == cost.flops.ratio_with_reuse == pytest.approx((24 + 16) / 24)


def test_uniform_training_costs_what_it_costs(shards: list[str]) -> None:
    uniform = SelectionConfig(method="uniform")
    with jest(shards, vit(), selection=uniform) as dataset:
        next(iter(dataset))
        assert flops_of(dataset) == (24 * forward_by_hand(), 0, 0, 0)
        assert dataset.metrics()["flops_ratio"] == 1.0
        assert "nothing was scored" in str(dataset.cost())


def test_a_smaller_score_view_and_a_reference_of_its_own_size_count_themselves(
    shards: list[str],
) -> None:
    class AnySize(nn.Module):
        """An open_clip model at 32 px, and one at 16 px that shares nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.full, self.small = vit(1), vit(2, image_size=16)
            self.logit_scale, self.logit_bias = self.full.logit_scale, self.full.logit_bias

        def encode_image(self, image: Tensor) -> Tensor:
            model = self.full if image.shape[-1] == 32 else self.small
            return model.encode_image(image)

        def encode_text(self, text: Tensor) -> Tensor:
            return self.full.encode_text(text)

    options: dict[str, Any] = {
        "transform": half_pixels,
        "train_transform": pixels,
        "reference_transform": pixels,
        "lookahead": 0,
    }
    with jest(shards, AnySize(), **options) as dataset:
        next(iter(dataset))
        training, learner, reference, _ = flops_of(dataset)
        cost = dataset.cost()
    assert training == 24 * forward_by_hand()
    assert learner == 16 * forward_by_hand(image_size=16)
    assert reference == 16 * forward_by_hand()
    assert cost.flops.ratio == cost.flops.ratio_with_reuse  # no pass could serve training


@pytest.mark.parametrize("number", [None, 10**6])
def test_training_at_two_sizes_is_compared_with_training_at_the_full_one(
    shards: list[str], number: int | None
) -> None:
    options = {"scoring": ScoringConfig(image_size=16), "score_view_fraction": 0.25, "lookahead": 0}
    full, small = forward_by_hand(), forward_by_hand(image_size=16)
    with jest(shards, vit(), **options, training_flops=number) as dataset:
        for _ in islice(dataset, 3):
            pass
        training, learner, reference, selection = flops_of(dataset)
        flops = dataset.cost().flops
    steps = 3 * (6 * full + 2 * small)  # forward passes of 6 and of 2 of 8
    uniform, reusable = 3 * 8 * full, 3 * 2 * small
    assert training == (3 * steps if number is None else 3 * 8 * number)
    uniform_training = training * uniform / steps
    assert learner == reference == 3 * 16 * small
    total = training + learner + reference + selection
    assert flops.ratio == pytest.approx(total / uniform_training)
    assert flops.ratio_with_reuse == pytest.approx((total - reusable) / uniform_training)


class Lookups(nn.Module):
    """Looks up and averages, in which torch counts no FLOPs. Takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.textual = nn.EmbeddingBag(VOCABULARY, 3)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_image(self, image: Tensor) -> Tensor:
        return image.mean((2, 3))

    def encode_text(self, text: Tensor) -> Tensor:
        return self.textual(text)


def test_two_sizes_that_cost_nothing_cannot_be_compared_and_stop_nothing(
    shards: list[str],
) -> None:
    options = {"scoring": ScoringConfig(image_size=16), "score_view_fraction": 0.25}
    with jest(shards, Lookups(), **options, reference=Lookups()) as dataset:
        next(iter(dataset))
        assert dataset.metrics()["flops_training"] == 0
        assert math.isnan(dataset.metrics()["flops_ratio"])
        assert str(dataset.cost())


def test_the_number_of_the_user_has_precedence(shards: list[str]) -> None:
    learner = vit()
    image, text = torch.randn(4, 3, 32, 32), torch.ones(4, WORDS, dtype=torch.int64)

    def loss(model: nn.Module) -> Tensor:
        image_rows, text_rows = model.encode_image(image), model.encode_text(text)
        return (image_rows * text_rows).sum()

    per_example = training_flops(learner, loss) / 4
    with jest(shards, learner, lookahead=0, training_flops=per_example) as dataset:
        next(iter(dataset))
        assert dataset.metrics()["flops_training"] == 8 * per_example
        assert dataset.cost().flops.reusable == 8 * forward_by_hand()
        assert "estimated" not in str(dataset.cost())
    # The estimate knows nothing of first layers, whose inputs need no gradient.
    assert per_example == 3 * forward_by_hand() - 2 * 16 * (3 * 8 * 8) * WIDTH


@pytest.mark.parametrize("number", [0, -1, math.inf, math.nan, "many"])
def test_a_training_cost_that_is_none_is_refused(shards: list[str], number: Any) -> None:
    with pytest.raises(ConfigError, match="training_flops must be"):
        jest(shards, vit(), training_flops=number)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_counts_go_on_after_a_resume(shards: list[str], lookahead: int) -> None:
    options: dict[str, Any] = {"lookahead": lookahead, "repeat": False, "filter_ratio": 0.75}
    counted = ("flops_ratio", "flops_ratio_with_reuse", *(f"flops_{name}" for name in FLOPS))
    with jest(shards, vit(), **options) as whole:
        states = []
        for _ in whole:
            states.append(json.loads(json.dumps(whole.state_dict())))
        expected = {name: whole.metrics()[name] for name in counted}
    assert len(states) == 8 and not any(map(math.isnan, expected.values()))
    for state in (states[0], states[3], states[5]):
        with jest(shards, vit(), **options) as resumed:
            resumed.load_state_dict(state)
            assert (
                0 < resumed.metrics()["flops_learner_scoring"] < expected["flops_learner_scoring"]
            )
            for _ in resumed:
                pass
            assert {name: resumed.metrics()[name] for name in counted} == expected


def test_a_resume_after_the_last_selection_still_knows_what_it_cost(shards: list[str]) -> None:
    options = {"selection": SelectionConfig(stop_step=2)}
    with jest(shards, vit(), **options) as dataset:
        for _ in islice(dataset, 3):
            pass
        state, expected = dataset.state_dict(), flops_of(dataset)
    assert not any(map(math.isnan, expected))
    with jest(shards, vit(), **options) as resumed:
        resumed.load_state_dict(state)
        assert flops_of(resumed) == expected
        next(iter(resumed))  # no model is asked any more
        assert flops_of(resumed)[1:] == expected[1:]


def test_a_reference_that_is_gone_after_a_resume_is_said_to_be(
    shards: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with jest(shards, vit()) as dataset:
        next(iter(dataset))
        state = dataset.state_dict()
    views = {"transform": pixels, "tokenizer": tokenize}
    cache = ReferenceCache.build(shards, vit(7), tmp_path / "cache", **views)
    with cache, jest(shards, vit(), reference=cache) as resumed:
        resumed.load_state_dict(state)
        for _ in range(2):
            training, learner, reference, _ = flops_of(resumed)
    assert math.isnan(reference) and training > 0 and learner > 0
    (message,) = [record.getMessage() for record in caplog.records]
    assert "the reference's scoring cannot be counted" in message
    assert "the run that was resumed had a live reference" in message


def test_other_ranks_share_out_what_was_paid(shards: list[str]) -> None:
    with jest(shards, vit()) as dataset:
        next(iter(dataset))
        counters = dict(dataset.state_dict()["ranks"]["0"]["counters"])
    paid = {name: count for name, count in counters.items() if name.startswith("flops/")}
    assert len(paid) == 5
    shares = [shared_out([counters, counters], rank=rank, world_size=3) for rank in range(3)]
    for name, count in paid.items():
        assert sum(share[name] for share in shares) == 2 * count


class Delicate(nn.Module):
    """Everything that counting could disturb: running statistics, dropout, counts, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.model = vit()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.logit_scale, self.logit_bias = self.model.logit_scale, self.model.logit_bias
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def encode_image(self, image: Tensor) -> Tensor:
        self.num_calls += 1
        rows: Tensor = self.model.encode_image(self.dropout(self.norm(image)))
        return rows

    def encode_text(self, text: Tensor) -> Tensor:
        return self.model.encode_text(text)


def test_nothing_of_the_user_s_is_touched(shards: list[str]) -> None:
    learner, reference = Delicate().train(), vit(1)
    seen: list[tuple[nn.Module, int]] = []

    def look(module: nn.Module, arguments: tuple[Tensor], _: Tensor) -> None:
        seen.append((module, len(arguments[0])))

    learner.norm.register_forward_hook(look)
    hooks = [len(module._forward_hooks) for module in learner.modules()]
    with jest(shards, learner, reference=reference) as dataset:
        images, texts = next(iter(dataset))
        (learner.encode_image(images) * learner.encode_text(texts)).sum().backward()
        before, grads = copy.deepcopy(learner.state_dict()), gradients(learner)
        random_state, seen_before = torch.get_rng_state(), len(seen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            metrics = dataset.metrics()
        dataset.cost()
        dataset.metrics()
    assert metrics["flops_training"] == 24 * forward_by_hand()
    assert learner.training and all(module.training for module in learner.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    for name, tensor in learner.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, grad in gradients(learner).items():
        assert (grad is None) == (grads[name] is None), name
        assert grad is None or torch.equal(grad, grads[name]), name
    assert all(parameter.requires_grad for parameter in learner.parameters())
    assert [len(module._forward_hooks) for module in learner.modules()] == hooks
    assert not torch.nn.modules.module._global_forward_hooks
    # Once for the copy and once for the learner's own size, each time one row, by a stand-in.
    assert [rows for _, rows in seen[seen_before:]] == [1, 1]
    assert all(module is not learner.norm for module, _ in seen[seen_before:])


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {name: None if grad is None else grad.clone() for name, grad in grads.items()}


def test_the_stand_in_has_the_learner_s_weights_and_no_copy_of_them() -> None:
    learner, met = vit().train(), []
    learner.visual.conv1.register_forward_hook(lambda module, *_: met.append(module))
    embed_once(learner, torch.ones(1, 3, 32, 32), torch.ones(1, WORDS, dtype=torch.int64))
    (found,) = met
    assert found is not learner.visual.conv1 and not found.training
    assert found.weight.data_ptr() == learner.visual.conv1.weight.data_ptr()
    assert not found.weight.requires_grad and learner.visual.conv1.weight.requires_grad


def test_who_never_asks_pays_nothing_and_who_asks_pays_once(shards: list[str]) -> None:
    learner, rows = vit(), []
    learner.visual.register_forward_hook(lambda _, arguments, __: rows.append(len(arguments[0])))
    with jest(shards, learner, lookahead=0) as dataset:
        stream = iter(dataset)
        next(stream)
        assert rows == [16]
        dataset.state_dict()
        assert rows == [16]
        for _ in range(3):
            dataset.metrics()
        next(stream)
        dataset.metrics()
        assert rows == [16, 1, 1, 16]


def test_metrics_within_inference_mode_leave_the_stream_usable(shards: list[str]) -> None:
    learner = vit()
    with jest(shards, learner) as dataset:
        stream = iter(dataset)
        with torch.inference_mode():
            next(stream)
            assert dataset.metrics()["flops_training"] == 24 * forward_by_hand()
        images, _ = next(stream)
        learner.encode_image(images).sum().backward()


class OnlyLarge(nn.Module):
    """Refuses single rows: stands for any model that cannot be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.model = vit()
        self.logit_scale, self.logit_bias = self.model.logit_scale, self.model.logit_bias

    def encode_image(self, image: Tensor) -> Tensor:
        if len(image) == 1:
            raise NotImplementedError("no kernel for one row")
        return self.model.encode_image(image)

    def encode_text(self, text: Tensor) -> Tensor:
        return self.model.encode_text(text)


def test_what_cannot_be_counted_is_nan_and_said_once(
    shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with jest(shards, OnlyLarge(), lookahead=0) as dataset:
        stream = iter(dataset)
        next(stream)
        for _ in range(2):
            next(stream)
            training, learner, reference, selection = flops_of(dataset)
        text = str(dataset.cost())
    assert math.isnan(training) and math.isnan(learner)
    assert reference == 48 * forward_by_hand() and selection > 0
    assert "unknown training" in text and "cost against uniform training: unknown" in text
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # of the copy, and of training
    assert all("NotImplementedError: no kernel for one row" in message for message in messages)
    assert sum("JESTDataset(training_flops=...)" in message for message in messages) == 1


def test_texts_that_are_no_tensors_are_handed_out_all_the_same(
    shards: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    uniform = SelectionConfig(method="uniform")
    with jest(shards, vit(), tokenizer=None, selection=uniform) as dataset:
        _, texts = next(iter(dataset))
        assert isinstance(texts[0], str) and math.isnan(dataset.metrics()["flops_training"])
    assert "the text is a list, not a tensor" in caplog.text
    with jest(shards, selection=uniform) as dataset:  # nobody knows what is trained
        next(iter(dataset))
        assert math.isnan(dataset.metrics()["flops_training"])


def test_nothing_is_measured_while_a_graph_is_captured(shards: list[str]) -> None:
    cuda = {"is_initialized": lambda: True, "is_current_stream_capturing": lambda: True}
    with jest(shards, vit()) as dataset:
        next(iter(dataset))
        with mock.patch.multiple(torch.cuda, **cuda):
            assert math.isnan(dataset.metrics()["flops_training"])
        assert dataset.metrics()["flops_training"] == 24 * forward_by_hand()


def test_compiled_layers_are_not_traced_anew(shards: list[str]) -> None:
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        traced.append("once")
        return graph

    learner = vit()
    learner.visual.conv1 = torch.compile(learner.visual.conv1, backend=backend, dynamic=False)
    options: dict[str, Any] = {"batch_size": 8, "super_batch_size": 16, "lookahead": 0}
    with jest(shards, learner, **options) as dataset:
        stream = iter(dataset)
        images, _ = next(stream)
        learner.encode_image(images)
        num_traced = len(traced)
        assert dataset.metrics()["flops_training"] == 24 * forward_by_hand()
        images, _ = next(stream)
        learner.encode_image(images)
    assert len(traced) == num_traced > 0


def test_all_times_add_up_to_the_time_of_the_loop(shards: list[str]) -> None:
    with jest(shards, vit(), steps_per_epoch=4) as dataset:
        begin = time.perf_counter()
        for _ in dataset:
            spin(0.02)
        wall = time.perf_counter() - begin
        first = dataset.cost()
        spin(0.05)  # a test between two epochs is no training
        assert dataset.cost().wall_s == first.wall_s
        assert first.wall_s == pytest.approx(wall, abs=0.005)
        assert 4 * 0.02 <= first.training_s < wall
        assert min(first.data_s, first.scoring_s, first.selecting_s, first.yielding_s) > 0
        for step, _ in enumerate(dataset):
            if step == 1:
                spin(0.02)
                break
        second = dataset.metrics()
        assert second["training_s"] >= first.training_s + 0.02
        spin(0.01)
        assert dataset.metrics()["training_s"] == second["training_s"]
    metrics = dataset.metrics()
    parts = ("data", "scoring", "selecting", "yielding", "training")
    assert sum(metrics[f"{part}_s"] for part in parts) == pytest.approx(dataset.cost().wall_s)


def test_the_summary_says_what_selection_must_save(shards: list[str]) -> None:
    forward = forward_by_hand()
    selection = SelectionConfig(num_chunks=1)
    with jest(shards, vit(), lookahead=0, selection=selection, filter_ratio=0.8) as dataset:
        next(iter(dataset))
        cost = dataset.cost()
    assert isinstance(cost, RunCost)
    with pytest.raises(FrozenInstanceError):
        cost.samples_read = 0  # type: ignore[misc]
    assert cost.flops.ratio == pytest.approx(13 / 3)
    assert cost.flops.ratio_with_reuse == pytest.approx(12 / 3)
    assert cost.savings_to_pay == pytest.approx(1 - 3 / 13)
    examples, flops, verdict, seconds = str(cost).splitlines()
    assert examples == "examples: 40 read, 40 scored, 8 trained"
    training, scoring = 24 * forward / 1e6, 40 * forward / 1e6
    assert flops == (
        f"MFLOP: {training:.3g} training, {scoring:.3g} learner scoring, {scoring:.3g} reference "
        f"scoring, 0 selection (training estimated as three forward passes)"
    )
    assert verdict == (
        "4.33 times the FLOPs of uniform training (4.00 as the paper counts, which scores and "
        "trains in one pass): selection pays if it saves more than 77% of the steps"
    )
    assert seconds.startswith("seconds: 0.")
    assert str(dataset.cost()) == str(cost)  # closed by now


def test_steps_that_cost_less_than_uniform_ones_need_save_nothing(shards: list[str]) -> None:
    easy = SelectionConfig(score="easy_reference", num_chunks=1)
    options = {"scoring": ScoringConfig(image_size=16), "score_view_fraction": 0.75}
    with jest(shards, vit(), lookahead=0, selection=easy, filter_ratio=0.2, **options) as dataset:
        next(iter(dataset))
        cost = dataset.cost()
    assert cost.flops.ratio < 1 and cost.savings_to_pay < 0
    _, _, verdict, _ = str(cost).splitlines()
    assert verdict.endswith("times the FLOPs of uniform training: it pays at as many steps")


def test_a_listener_is_told_when_the_run_ends_and_nobody_else(
    shards: list[str], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.WARNING, "jest_stream"):
        with jest(shards, vit()) as dataset:
            next(iter(dataset))
        assert caplog.records == []
        assert math.isnan(dataset.cost().flops.ratio)  # nobody asked while the models were there
    with caplog.at_level(logging.INFO, "jest_stream"):
        with jest(shards, vit()) as dataset:
            next(iter(dataset))
        dataset.close()
        with jest(shards, vit()):
            pass  # nothing was drawn
        (record,) = caplog.records
    assert "selection pays if it saves more than" in record.getMessage()
    assert capfd.readouterr() == ("", "")


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_a_random_train_view_of_the_same_size_counts_as_reusable(shards: list[str]) -> None:
    """The paper scores what it trains on; a loader of one's own may not, the price is the same."""
    options: dict[str, Any] = {"reference": TinyTwoTower(1), "train_transform": flipped}
    with jest(shards, TinyTwoTower(0), transform=to_tensor, lookahead=0, **options) as dataset:
        next(iter(dataset))
        flops = dataset.cost().flops
    assert flops.reusable == flops.training / 3 == flops.learner_scoring / 2
