"""A selector scores only where there is a choice, with the weights that were due.

    pytest tests/pipeline/test_selector.py

The models are made such that the similarity of each candidate's pair is known: candidate n has
word n, and its image and text embeddings have the n-th of some given cosines between them.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.models import NUM_WORDS, TinyTwoTower
from support.pairs import Pairs, alone, sizes_of, stream_config
from torch import Tensor

from jest_stream.config import Quota, ScoringConfig, SelectionConfig, TargetSimilarity, Term
from jest_stream.metrics import Metrics
from jest_stream.pipeline.models import Models
from jest_stream.pipeline.selector import Selector
from jest_stream.pipeline.super_batches import ScoredSuperBatch, SuperBatch, SuperBatchReader
from jest_stream.sources import open_source
from jest_stream.types import Example
from jest_stream.views import REFERENCE

pytestmark = pytest.mark.usefixtures("no_leaks")

#              0    1     2    3    4     5    6     7
COSINES = [0.9, -0.8, 0.5, 0.1, -0.3, 0.7, -0.9, 0.2]
EQUAL = [0.0] * 8


def similar(cosines: list[float]) -> TinyTwoTower:
    """A model in which image n is the first axis, and text n lies at the n-th cosine to it."""
    model = TinyTwoTower()
    with torch.no_grad():
        model.image.zero_()[:, 0] = 1.0
        model.words.zero_()[: len(cosines), 0] = torch.tensor(cosines)
        model.words[:, 1] = (1 - model.words[:, 0] ** 2).sqrt()
    return model


class Unused(TinyTwoTower):
    """A model that no test of equal candidates may run."""

    def encode_image(self, image: Tensor) -> Tensor:
        raise AssertionError("scored, although nothing is chosen")


GREEDY = {"method": "independent", "gain": math.inf}


class Choosing:
    """A selector of 3 out of 8 candidates, greedy and each alone unless told."""

    def __init__(
        self,
        learner: TinyTwoTower | None = None,
        reference: TinyTwoTower | None = None,
        *,
        refresh_every: int = 1,
        with_reference: bool = False,
        key: int = 7,
        **rule: Any,
    ) -> None:
        self.metrics = Metrics()
        self.config = SelectionConfig(**{**GREEDY, **rule})
        self.models = Models(self.config, learner, reference, with_reference=with_reference)
        self.selector = Selector(
            self.config,
            self.models,
            scoring=ScoringConfig(),
            refresh_every=refresh_every,
            pixel_tables={},
            key=key,
            metrics=self.metrics,
            with_reference=with_reference,
        )

    def candidates(self, size: int = 8, **columns: Any) -> SuperBatch:
        """The first candidates of a shard of 8, with more columns."""
        reader = SuperBatchReader(
            stream_config(),
            sizes_of(3, size),
            source=open_source(Pairs([8])),
            layout=alone(1),
            prepare=row_of,
        )
        super_batch = reader.read(size, slot=self.selector.slot([]), end_epoch=1)
        super_batch.columns.update(columns)
        return super_batch

    def select(
        self, super_batch: SuperBatch | None = None, *, size: int = 8, step: int = 0, now: int = 0
    ) -> ScoredSuperBatch:
        super_batch = super_batch or self.candidates(size)
        return self.selector.select(super_batch, batch_size=3, step=step, now=now)

    @property
    def num_scored(self) -> int:
        return int(self.metrics.as_dict()["samples_scored"])


def row_of(example: Example) -> dict[str, Any]:
    names = {"key": example["__key__"], "shard": "shard 0"}
    return {**names, "image": example["image"], "text": example["text"]}


def chosen(scored: ScoredSuperBatch) -> list[int]:
    """The chosen candidates, sorted."""
    return sorted(scored.selection.on_host().indices.tolist())


@pytest.mark.parametrize(
    ("score", "learner", "reference", "expected"),
    [
        ("hard_learner", COSINES, None, [1, 4, 6]),  # the least similar
        ("easy_reference", None, COSINES, [0, 2, 5]),  # the most similar
        ("learnability", COSINES, EQUAL, [1, 4, 6]),
        ("learnability", EQUAL, COSINES, [0, 2, 5]),
        # Where both agree nothing is learnable: it is 2, 3 and 7, which only the reference knows.
        (
            "learnability",
            [0.9, -0.8, -0.5, -0.1, -0.3, 0.7, -0.9, -0.2],
            [0.9, -0.8, 0.5, 0.8, -0.3, 0.7, -0.9, 0.2],
            [2, 3, 7],
        ),
    ],
)
def test_the_greediest_rule_takes_the_best_scores(
    score: str, learner: list[float] | None, reference: list[float] | None, expected: list[int]
) -> None:
    made = [None if cosines is None else similar(cosines) for cosines in (learner, reference)]
    choosing = Choosing(*made, score=score)
    assert chosen(choosing.select()) == expected
    assert choosing.num_scored == 8


def test_a_super_batch_of_the_size_of_a_batch_is_taken_whole_and_not_scored() -> None:
    choosing = Choosing(Unused(), Unused())
    scored = choosing.select(size=3)
    assert chosen(scored) == [0, 1, 2]
    assert scored.selection.on_host().weights.tolist() == [1, 1, 1]
    assert scored.weights_step is None and choosing.num_scored == 0
    assert choosing.selector.weights_step is None, "the learner's weights are not even copied"
    assert choosing.selector.state_dict() is None


def test_the_uniform_rule_scores_nothing_and_draws_by_key_and_step() -> None:
    def draw(key: int, step: int) -> list[int]:
        choosing = Choosing(Unused(), Unused(), method="uniform", gain=1.0, key=key)
        indices = choosing.select(step=step).selection.on_host().indices.tolist()
        assert choosing.num_scored == 0 and len(set(indices)) == 3
        return indices

    assert draw(7, 0) == draw(7, 0)
    assert len({tuple(draw(7, step)) for step in range(6)}) > 1
    assert len({tuple(draw(key, 0)) for key in range(6)}) > 1


def test_the_weights_that_score_are_those_of_the_last_refresh_that_was_due() -> None:
    """Refreshed every 2: the learner turns its similarities round after its first batch."""
    learner = similar(COSINES)
    choosing = Choosing(learner, refresh_every=2, score="hard_learner")
    found = [choosing.select(now=0)]
    learner.load_state_dict(similar([-cosine for cosine in COSINES]).state_dict())
    found += [choosing.select(now=now) for now in (1, 2, 3)]
    assert [scored.weights_step for scored in found] == [0, 0, 2, 2]
    assert [chosen(scored) for scored in found] == [[1, 4, 6], [1, 4, 6], [0, 2, 5], [0, 2, 5]]


def test_a_refresh_that_is_asked_for_need_not_be_due() -> None:
    choosing = Choosing(similar(COSINES), refresh_every=100, score="hard_learner")
    choosing.select(now=0)
    choosing.selector.refresh(5)
    assert choosing.selector.weights_step == 5


def test_after_a_failure_the_learner_is_copied_anew() -> None:
    """It may have been repaired since, and the next refresh may be far away."""
    choosing = Choosing(similar(COSINES), refresh_every=100, score="hard_learner")
    unknown_words = torch.full((8, 4), NUM_WORDS)
    choosing.select(now=0)
    with pytest.raises(IndexError, match="out of"):
        choosing.select(choosing.candidates(text=unknown_words), now=1)
    assert choosing.selector.weights_step == 0
    assert [choosing.select(now=now).weights_step for now in (2, 3)] == [2, 2]


def test_a_learner_copy_goes_through_a_checkpoint() -> None:
    before = Choosing(similar(COSINES), refresh_every=100, score="hard_learner")
    before.select(now=4)
    state = before.selector.state_dict()
    turned = similar([-cosine for cosine in COSINES])
    after = Choosing(turned, refresh_every=100, score="hard_learner")
    after.selector.load_state_dict(state)
    scored = after.select(now=5)
    assert scored.weights_step == 4 and chosen(scored) == [1, 4, 6], "by the checkpoint's weights"
    after.selector.load_state_dict(None)
    scored = after.select(now=6)
    assert scored.weights_step == 6 and chosen(scored) == [0, 2, 5], "by the learner's own"


def test_a_selection_of_a_former_run_is_put_back_without_scoring() -> None:
    choosing = Choosing(similar(COSINES), score="hard_learner")
    selection = choosing.select(now=3).selection.on_host()
    again = Choosing(Unused(), score="hard_learner")
    scored = again.selector.restore(again.candidates(), selection, 3)
    assert chosen(scored) == [1, 4, 6]
    assert scored.weights_step == 3
    assert again.num_scored == 0 and again.selector.weights_step is None


def test_terms_are_added_to_the_score() -> None:
    choosing = Choosing(similar(EQUAL), score="hard_learner", terms=(Term(value="quality"),))
    term = torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0, 0.0, 0.0, 1.0])
    assert chosen(choosing.select(choosing.candidates(term=term))) == [1, 3, 7]


def test_similarity_to_targets_is_that_of_the_reference() -> None:
    """The target is the first axis; the learner, to which all are equal, has no say in it."""
    targets = TargetSimilarity(targets=torch.eye(1, 16), tower="text")
    choosing = Choosing(similar(EQUAL), similar(COSINES), score="hard_learner", terms=(targets,))
    assert chosen(choosing.select()) == [0, 2, 5]


def test_quotas_bound_the_groups_of_the_candidates() -> None:
    """A third of dogs: the hardest dog takes the place of the third hardest cat."""
    groups = ["cat", "cat", "dog", "dog", "cat", "cat", "cat", "cat"]
    rule = {"group_by": "kind", "quotas": {"dog": Quota(share=1 / 3)}}
    choosing = Choosing(similar(COSINES), score="hard_learner", **rule)
    scored = choosing.select(choosing.candidates(group=groups))
    assert choosing.selector.groups == ["dog"]
    assert chosen(scored) == [1, 3, 6]
    assert scored.selection.on_host().group_counts.tolist() == [1]


@pytest.mark.parametrize(
    ("rule", "num_scored"),
    [({"score": "hard_learner"}, 8), ({"method": "uniform", "gain": 1.0}, 0)],
)
def test_the_references_embeddings_stay_with_the_candidates_where_batches_have_them(
    rule: dict[str, Any], num_scored: int
) -> None:
    choosing = Choosing(similar(EQUAL), similar(COSINES), with_reference=True, **rule)
    columns = choosing.select().super_batch.columns
    assert torch.allclose(columns[f"{REFERENCE}/text"][:, 0], torch.tensor(COSINES))
    assert torch.allclose(columns[f"{REFERENCE}/image"], torch.eye(1, 16).expand(8, 16))
    entry = choosing.selector.reference_of(columns)
    assert entry["text"] is columns[f"{REFERENCE}/text"]
    assert entry["logit_scale"].item() == pytest.approx(math.exp(2.0))
    assert entry["logit_bias"].item() == -3.0
    assert choosing.num_scored == num_scored


def test_a_selection_put_back_has_the_references_embeddings_too() -> None:
    selection = Choosing(similar(COSINES), score="hard_learner").select().selection.on_host()
    again = Choosing(Unused(), similar(COSINES), score="hard_learner", with_reference=True)
    scored = again.selector.restore(again.candidates(), selection, 0)
    text = scored.super_batch.columns[f"{REFERENCE}/text"]
    assert torch.allclose(text[:, 0], torch.tensor(COSINES))


def test_candidates_have_no_embeddings_unless_batches_have_them() -> None:
    choosing = Choosing(similar(EQUAL), similar(COSINES))
    assert sorted(choosing.select().super_batch.columns) == ["image", "key", "shard", "text"]


def test_a_closed_selector_lets_go_of_copy_and_models() -> None:
    choosing = Choosing(similar(COSINES), score="hard_learner")
    choosing.select(now=2)
    choosing.selector.close()
    assert choosing.selector.weights_step is None
    assert choosing.models.learner is None and choosing.models.trained is None
