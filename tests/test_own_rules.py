"""A team's own rule works in `JESTDataset`: terms, targets, quotas, uniform picks and presets.

pytest tests/test_own_rules.py
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, tiny_dataset, train_step
from support.shards import draw, make_example, members, write_tar
from torch import Tensor

from jest_stream import (
    JESTDataset,
    Quota,
    SelectionConfig,
    TargetSimilarity,
    Term,
    WeightedScore,
    preset,
)
from jest_stream.errors import BadExampleError, ConfigError
from jest_stream.scoring.two_tower import two_tower
from jest_stream.selection.joint import select_jointly
from jest_stream.selection.targets import target_similarity

pytestmark = pytest.mark.usefixtures("no_leaks")

GREEDY = SelectionConfig(gain=math.inf, num_chunks=4)

SHARDS = {"num_shards": 6, "examples_per_shard": 20}
"""Six shards of 20 examples; `json` holds `index`, `caption` and `size`."""


jest = partial(tiny_dataset, batch_size=8, super_batch_size=24)
"""Batches of 8 out of 24, chosen by two untrained models."""


def candidates(shards: Any, **options: Any) -> dict[str, Any]:
    """The first super-batch, all of it."""
    config = SelectionConfig(method="uniform")
    batch: dict[str, Any] = next(iter(jest(shards, batch_size=24, selection=config, **options)))
    return batch


def colour(example: Any) -> str:
    return str(example["json"]["caption"].split()[1])


@pytest.mark.parametrize(
    ("value", "num_workers", "method"),
    [
        ("index", 0, "joint"),
        ("index", 2, "joint"),
        ("index", 0, "independent"),
        (lambda example: int(example["__key__"]), 2, "joint"),
    ],
)
def test_a_term_that_outweighs_all_else_decides(
    shards: list[str], value: Any, num_workers: int, method: Any
) -> None:
    rule = replace(GREEDY, method=method, terms=(Term(value=value, weight=1e6),))
    with jest(shards, selection=rule, num_workers=num_workers) as dataset:
        chosen = next(iter(dataset))
    offered = sorted(candidates(shards)["key"])
    assert sorted(chosen["key"]) == offered[-8:]


def test_terms_are_weighted_and_added_up(shards: list[str]) -> None:
    # 1e6 (index - size) - 2e6 index is least for the largest index.
    rule = replace(
        GREEDY,
        terms=(
            Term(value=lambda example: example["json"]["index"] - 32, weight=1e6),
            Term(value="index", weight=-2e6),
        ),
    )
    assert (
        sorted(next(iter(jest(shards, selection=rule)))["key"])
        == sorted(candidates(shards)["key"])[:8]
    )


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("score", ["learnability", "hard_learner"])
def test_what_is_closest_to_the_targets_is_chosen(
    shards: list[str], tower: Any, norm: float, score: str
) -> None:
    reference = TinyTwoTower(seed=2)
    offered = candidates(shards)
    with torch.no_grad():
        wanted = two_tower(reference).embed(offered["image"], offered["text"])
    rows: Tensor = getattr(wanted, tower)
    targets = rows[[3, 17]] * 5  # of any norm
    rule = replace(
        GREEDY, score=score, terms=(TargetSimilarity(targets=targets, weight=1e6, tower=tower,
                                                     norm=norm),)
    )  # fmt: skip
    chosen = next(iter(jest(shards, reference=reference, selection=rule)))
    cosines = rows @ rows[[3, 17]].T
    similarity = cosines.norm(dim=1) if norm == 2 else cosines.amax(1)
    best = similarity.topk(8).indices.tolist()
    assert set(chosen["key"]) == {offered["key"][i] for i in best}
    assert offered["key"][3] in chosen["key"] or norm == 2


def test_target_similarity_in_blocks_equals_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, targets = (torch.randn(n, 8, generator=generator) for n in (50, 7))
    cosines = rows @ torch.nn.functional.normalize(targets, dim=1).T
    monkeypatch.setattr("jest_stream.selection.targets._BLOCK", 30)
    for norm, expected in ((2, cosines.norm(dim=1)), (math.inf, cosines.amax(1))):
        found = target_similarity(rows.double(), targets, norm=norm)
        torch.testing.assert_close(found, expected)


def test_a_floor_a_cap_and_a_share_hold_in_every_batch_and_are_counted(shards: list[str]) -> None:
    rule = SelectionConfig(
        group_by=colour,
        quotas={"red": Quota(floor=0.25), "blue": Quota(cap=0.125), "green": Quota(share=0.25)},
    )
    dataset, total = jest(shards, super_batch_size=40, selection=rule), Counter[str]()
    for batch in islice(dataset, 8):
        found = Counter(colour({"json": {"caption": draw(int(k))[1]}}) for k in batch["key"])
        assert found["red"] >= 2 and found["blue"] <= 1 and found["green"] == 2
        assert sum(found.values()) == 8
        total += found
    metrics = dataset.metrics()
    for name in ("red", "blue", "green"):
        assert metrics[f"selected/{name}"] == total[name]
        assert metrics[f"quota_shortfall/{name}"] == metrics[f"quota_overrun/{name}"] == 0


def test_groups_are_made_of_several_keys_and_a_missing_one_is_reported(shards: list[str]) -> None:
    rule = SelectionConfig(
        group_by=("size", "caption"),
        quotas={(32, "a red circle"): Quota(floor=0.125), (16, "a red circle"): Quota(floor=0.25)},
    )
    dataset = jest(shards[:2], super_batch_size=40, selection=rule)
    captions = [draw(int(key))[1] for batch in islice(dataset, 5) for key in batch["key"]]
    metrics = dataset.metrics()
    assert captions.count("a red circle") == metrics["selected/(32, 'a red circle')"] >= 5
    assert metrics["selected/(16, 'a red circle')"] == 0
    assert metrics["quota_shortfall/(16, 'a red circle')"] == 5 * 2


def test_the_uniform_baseline_keeps_the_same_quotas(shards: list[str]) -> None:
    rule = SelectionConfig(method="uniform", group_by=colour, quotas={"red": Quota(share=0.25)})
    dataset = jest(shards, super_batch_size=40, selection=rule)
    list(islice(dataset, 4))
    assert dataset.metrics()["selected/red"] == 4 * 2
    whole = jest(shards, super_batch_size=8, selection=replace(rule, method="joint"))
    list(islice(whole, 4))  # nothing to choose: the quota cannot be kept, and that is counted
    metrics = whole.metrics()
    missed = metrics["quota_shortfall/red"] - metrics["quota_overrun/red"]
    assert metrics["selected/red"] + missed == 4 * 2


def test_sharpness_and_uniform_picks_reach_the_draw(shards: list[str]) -> None:
    rule = SelectionConfig(effective_support=6.0, num_chunks=2, uniform_fraction=0.5)
    dataset = jest(shards, selection=rule)
    for batch in islice(dataset, 4):
        assert len(set(batch["key"])) == 8
        assert dataset.metrics()["effective_support"] == pytest.approx(6.0, rel=1e-4)


def test_sweeps_reach_the_draw(shards: list[str]) -> None:
    learner, reference = TinyTwoTower(seed=1), TinyTwoTower(seed=2)
    offered = candidates(shards)
    with torch.no_grad():
        models = [
            two_tower(model).embed(offered["image"], offered["text"])
            for model in (learner, reference)
        ]
    # At this gain the choice is greedy, so that the noise of the run does not matter.
    rule = SelectionConfig(num_chunks=4, num_sweeps=2, gain=1e6)
    chosen = next(iter(jest(shards, learner=learner, reference=reference, selection=rule)))
    expected = select_jointly(*models, batch_size=8, num_chunks=4, num_sweeps=2, gain=1e6)
    assert chosen["key"] == [offered["key"][i] for i in expected.tolist()]
    with pytest.raises(ConfigError, match=r"selection.num_sweeps must be .* at least 0, got -1"):
        SelectionConfig(num_sweeps=-1)


@pytest.mark.parametrize("method", ["joint", "independent", "uniform"])
def test_a_batch_as_a_dict_has_a_weight_for_each_example(shards: list[str], method: Any) -> None:
    rule = SelectionConfig(method=method, num_chunks=2)
    for batch in islice(jest(shards, selection=rule), 3):
        assert batch["weight"].shape == (8,) and batch["weight"].dtype == torch.float32
        assert batch["weight"].mean().item() == pytest.approx(1, rel=1e-5)
        if method == "uniform":
            torch.testing.assert_close(batch["weight"], torch.ones(8))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_rule_of_ones_own_resumes_exactly_weights_and_counts_included(
    shards: list[str], num_workers: int
) -> None:
    rule = SelectionConfig(
        score=lambda learner, reference: learner - 0.5 * reference,
        terms=(Term(value="index", weight=0.01),),
        group_by=colour,
        quotas={"red": Quota(floor=0.25), "teal": Quota(floor=0.125)},
        uniform_fraction=0.25,
        num_chunks=3,
    )

    def run(dataset: JESTDataset, learner: TinyTwoTower, steps: int) -> list[dict[str, Any]]:
        seen = []
        for batch in islice(dataset, steps):
            seen.append(batch)
            train_step(learner, (batch["image"], batch["text"]))
        return seen

    def start(learner: TinyTwoTower) -> JESTDataset:
        return jest(shards, learner=learner, selection=rule, num_workers=num_workers)

    learner = TinyTwoTower(seed=1)
    with start(learner) as whole:
        expected = run(whole, learner, 6)
        metrics = whole.metrics()
    learner = TinyTwoTower(seed=1)
    with start(learner) as first, start(learner) as second:
        run(first, learner, 2)
        second.load_state_dict(first.state_dict())
        tail = run(second, learner, 4)
        for name in ("selected/red", "quota_shortfall/teal"):
            assert second.metrics()[name] == metrics[name] > 0
    for batch, other in zip(tail, expected[2:], strict=True):
        assert batch["key"] == other["key"]
        assert torch.equal(batch["weight"], other["weight"])


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        ({}, "missing_term", "has no 'quality' for term, only .*'json', 'txt'"),
        ({"quality": float("nan")}, "non_finite_term", "has nan for 'quality'.*on_bad_example"),
        ({"quality": float("-inf")}, "non_finite_term", "has -inf for 'quality'"),
        ({"quality": None}, "unreadable_term", "has None for 'quality', no number"),
        ({"quality": "good"}, "unreadable_term", "has 'good' for 'quality', no number"),
    ],
)
def test_an_example_without_a_usable_term_is_a_bad_one(
    tmp_path: Path, record: dict[str, Any], reason: str, message: str
) -> None:
    examples = [make_example(i) for i in range(24)]
    for i, example in enumerate(examples):
        example["json"] = json.dumps({"quality": 0.1 * i} if i != 5 else record).encode()
    shard = write_tar(tmp_path / "0.tar", members(examples))
    rule = SelectionConfig(terms=(Term(value="quality"),))
    options = {"super_batch_size": 12, "repeat": False, "selection": rule}
    with pytest.raises(BadExampleError, match=message) as caught:
        list(jest(shard, **options))
    assert caught.value.reason == reason and caught.value.key == "000005"
    dataset = jest(shard, on_bad_example="skip", **options)
    assert "000005" not in [key for batch in dataset for key in batch["key"]]
    assert dataset.metrics()[f"skipped/{reason}"] == 1


def test_an_example_without_a_group_is_a_bad_one(tmp_path: Path) -> None:
    examples = [make_example(i) for i in range(16)]
    del examples[3]["json"]
    shard = write_tar(tmp_path / "0.tar", members(examples))
    rule = SelectionConfig(group_by="size", quotas={32: Quota(floor=0.5)})
    with pytest.raises(BadExampleError, match="has no 'size' for group") as caught:
        list(jest(shard, repeat=False, selection=rule))
    assert caught.value.reason == "missing_group"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": (Term(value=lambda e: torch.ones(2)),)}, r"one number per example.*shape \[2\]"),
        ({"terms": (Term(value=lambda e: [1.0]),)}, "one number per example, got a list for"),
        ({"terms": (Term(value="json"),)}, "one number per example, got a dict"),
        (
            {"group_by": lambda e: [1], "quotas": {1: Quota(floor=0.5)}},
            "must give a value that can be a key of quotas, got a list for",
        ),
    ],
)
def test_metadata_of_another_shape_is_an_error(
    shards: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        next(iter(jest(shards, selection=SelectionConfig(**options))))


def similarity(**options: Any) -> TargetSimilarity:
    return TargetSimilarity(**{"targets": torch.ones(3, 16), **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SelectionConfig(gain=2.0, effective_support=9),
            "selection.effective_support=9 fi",
        ),
        (lambda: SelectionConfig(effective_support=0.0), "selection.effective_support must be a"),
        (lambda: SelectionConfig(uniform_fraction=1.0), "selection.uniform_fraction must be in"),
        (lambda: SelectionConfig(terms=(0.5,)), "selection.terms must be a tuple of Term and"),
        (lambda: SelectionConfig(terms=Term(value="a")), "One term is written"),
        (lambda: SelectionConfig(group_by="a"), "group_by='a' and quotas=None"),
        (lambda: SelectionConfig(quotas={}), "selection.group_by and selection.quotas need each"),
        (lambda: SelectionConfig(group_by=3, quotas={}), "selection.group_by must be a metadata"),
        (
            lambda: SelectionConfig(
                group_by="a", quotas={1: Quota(floor=0.6), 2: Quota(share=0.5)}
            ),
            "add up to 1.1, more than there is room for",
        ),
        (lambda: Term(value=3), "Term.value must be a metadata key or a function"),
        (lambda: Term(value="a", weight=math.nan), "Term.weight must be finite, got nan"),
        (lambda: similarity(weight=math.inf), "TargetSimilarity.weight must be finite"),
        (lambda: similarity(tower="both"), "TargetSimilarity.tower must be one of 'image', 'text'"),
        (lambda: similarity(norm=1), "TargetSimilarity.norm must be 2 or infinity, got 1"),
        (lambda: similarity(targets=torch.ones(3)), r"must be \[T, D\] floating point.*got \[3\]"),
        (lambda: similarity(targets=torch.zeros(3, 4)), "a row of zeros, which has no direction"),
        (lambda: similarity(targets=torch.full((1, 4), math.nan)), "hold NaN, infinity"),
        (lambda: preset("best"), "preset must be one of 'jest', .*'uniform', got 'best'"),
    ],
)
def test_rules_that_cannot_work_are_refused_when_they_are_made(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_floors_without_room_in_a_batch_are_refused_before_anything_is_read() -> None:
    rule = SelectionConfig(group_by="a", quotas={i: Quota(floor=0.05) for i in range(9)})
    with pytest.raises(ConfigError, match="at least 9 examples.*batch_size=8 has no room"):
        jest("not/there.tar", selection=rule)


def test_targets_need_a_reference_of_their_dimension(shards: list[str]) -> None:
    rule = SelectionConfig(score="hard_learner", terms=(similarity(),))
    with pytest.raises(ConfigError, match="reference=None, but TargetSimilarity compares"):
        jest(shards, reference=None, selection=rule)
    rule = SelectionConfig(terms=(similarity(targets=torch.ones(3, 9)),))
    with pytest.raises(
        ConfigError, match="targets have dimension 9, the reference's embeddings 16"
    ):
        next(iter(jest(shards, selection=rule)))


def test_a_score_callable_that_returns_another_shape_is_refused(shards: list[str]) -> None:
    rule = SelectionConfig(score=lambda learner, reference: learner.mean())
    with pytest.raises(ConfigError, match=r"tensor of the shape of the two pair-loss tiles.*\[\]"):
        next(iter(jest(shards, selection=rule)))


@pytest.mark.parametrize(
    ("name", "size"),
    [("jest", 40), ("siglip2_acid", 16), ("activeclip", 16), ("rho_loss", 80), ("uniform", 8)],
)
def test_every_preset_runs_as_it_is(shards: list[str], name: str, size: int) -> None:
    dataset = jest(shards, super_batch_size=None, **preset(name))
    for batch in islice(dataset, 2):
        assert len(set(batch["key"])) == 8
    assert dataset.metrics()["samples_read"] == 2 * size


def test_presets_are_what_their_papers_say() -> None:
    assert preset("jest")["selection"] == SelectionConfig(num_chunks=16)
    assert preset("siglip2_acid")["selection"].loss == "sigmoid"
    assert preset("activeclip")["selection"].method == "independent"
    assert math.isinf(preset("rho_loss")["selection"].gain)
    changed = preset("jest")
    changed["filter_ratio"] = 0.1
    assert preset("jest")["filter_ratio"] == 0.8


def test_a_weighted_score_needs_only_what_it_weighs(shards: list[str]) -> None:
    rule = SelectionConfig(score=WeightedScore(0.0, -2.0))
    assert len(next(iter(jest(shards, learner=None, selection=rule)))["key"]) == 8
