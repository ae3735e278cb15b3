"""A batch holds the chosen rows in draw order, finished where they are trained on, and is booked.

pytest tests/pipeline/test_batches.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.pairs import Pairs, alone, sizes_of, stream_config
from torch import Tensor

from jest_stream.config import ScoringConfig
from jest_stream.metrics import Metrics
from jest_stream.pipeline.batches import Batches, book, book_skipped, structured
from jest_stream.pipeline.device import Ring
from jest_stream.pipeline.super_batches import ScoredSuperBatch, SuperBatch, SuperBatchReader
from jest_stream.pipeline.two_sizes import TwoSizes
from jest_stream.sources import open_source
from jest_stream.types import Example, Selection
from jest_stream.views import REFERENCE, Columns, LateViews, PixelTable, TrainView, put_view

pytestmark = pytest.mark.usefixtures("no_leaks")

CPU = torch.device("cpu")
CHOSEN, WEIGHTS = [7, 2, 5, 0], [0.5, 1.5, 1.25, 0.75]


def row_of(example: Example) -> dict[str, Any]:
    """Candidate n, with n as every word of its text and every pixel of its uint8 image."""
    text = example["text"]
    image = torch.full((3, 8, 8), int(text[0]), dtype=torch.uint8)
    return {"key": example["__key__"], "shard": "shard 0", "image": image, "text": text}


def candidates(size: int = 10) -> SuperBatch:
    """The first candidates of one endless shard of 10: `0-0` to `0-9`, then the same again."""
    reader = SuperBatchReader(
        stream_config(),
        sizes_of(4, size),
        source=open_source(Pairs([10])),
        layout=alone(1),
        prepare=row_of,
    )
    return reader.read(size, slot=Ring().slot(), end_epoch=None)


def scored(
    super_batch: SuperBatch | None = None,
    *,
    is_finite: bool = True,
    weights_step: int | None = 0,
    groups: tuple[list[int], list[int]] = ([], []),
) -> ScoredSuperBatch:
    """Candidates of which the four of `CHOSEN` were selected."""
    super_batch = super_batch or candidates()
    selection = Selection(
        indices=torch.tensor(CHOSEN),
        weights=torch.tensor(WEIGHTS),
        effective_support=torch.tensor([6.0]),
        selected_score=torch.tensor(1.5),
        candidate_score=torch.tensor(0.5),
        group_counts=torch.tensor(groups[0]),
        quota_excess=torch.tensor(groups[1]),
        is_finite=torch.tensor(is_finite),
    )
    pending = super_batch.slot.restore(selection)
    return ScoredSuperBatch(super_batch=super_batch, selection=pending, weights_step=weights_step)


def halved(pixels: Tensor) -> Tensor:
    return pixels.float() / 2


HALVES = PixelTable([halved], takes_pictures=False)


def numbers(view: Any) -> list[float]:
    """The number that fills each row of a view."""
    assert all(row.min() == row.max() for row in view)
    return [row.flatten()[0].item() for row in view]


class Negated:
    """A train transform: `[1, 6, 6]`, filled with minus the candidate's number. Counts calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, picture: Any) -> Tensor:
        self.num_calls += 1
        return torch.full((1, 6, 6), -float(picture.getpixel((0, 0))[0]))


@pytest.fixture
def negated() -> Negated:
    return Negated()


@pytest.fixture
def late(negated: Negated) -> Iterator[LateViews]:
    """Makes train views in this process, of the score view's pixels."""
    view = TrainView(transform=negated, seed=0, rank=0, is_of_score_view=True)
    views = LateViews(view, num_workers=0, timeout_s=10.0)
    yield views
    views.forget()


def test_a_batch_holds_the_chosen_rows_in_draw_order() -> None:
    batch = Batches(None, {}).make(scored(), step=0, device=CPU)
    assert batch["key"] == ["0-7", "0-2", "0-5", "0-0"]
    assert numbers(batch["image"]) == numbers(batch["text"]) == [7, 2, 5, 0]
    assert batch["weight"].tolist() == WEIGHTS
    assert list(batch) == ["key", "image", "text", "weight"], "and none of the columns of scoring"


def test_a_batch_outlasts_its_super_batch() -> None:
    selected = scored()
    batch = Batches(None, {}).make(selected, step=0, device=CPU)
    for name in ("image", "text"):
        selected.super_batch.columns[name].zero_()
    assert numbers(batch["image"]) == numbers(batch["text"]) == [7, 2, 5, 0]


def test_pixels_are_finished_for_the_chosen_only() -> None:
    selected = scored()
    batch = Batches(None, {"image": HALVES}).make(selected, step=0, device=CPU)
    assert numbers(batch["image"]) == [3.5, 1.0, 2.5, 0.0]
    assert selected.super_batch.columns["image"].dtype == torch.uint8


def test_a_train_view_takes_the_place_of_the_image(late: LateViews, negated: Negated) -> None:
    """The work left to do to the score view's pixels is none of the train view's."""
    batch = Batches(late, {"image": HALVES}).make(scored(), step=0, device=CPU)
    assert batch["image"].shape == (4, 1, 6, 6)
    assert numbers(batch["image"]) == [-7, -2, -5, 0]
    assert numbers(batch["text"]) == [7, 2, 5, 0]
    assert negated.num_calls == 4, "none is made of the candidates that were not chosen"


def test_train_views_asked_for_ahead_are_asked_for_once(late: LateViews, negated: Negated) -> None:
    batches, selected = Batches(late, {}), scored()
    batches.start(selected, step=3)
    batches.start(selected, step=3)
    assert late.has(3) and not late.has(0)
    batch = batches.make(selected, step=3, device=CPU)
    assert numbers(batch["image"]) == [-7, -2, -5, 0]
    assert negated.num_calls == 4 and not late.has(3)


def test_no_train_views_are_asked_for_of_a_selection_that_means_nothing(late: LateViews) -> None:
    Batches(late, {}).start(scored(is_finite=False), step=0)
    assert not late.has(0)


def test_a_pause_keeps_the_train_views_that_were_asked_for_and_forgetting_does_not(
    late: LateViews,
) -> None:
    batches, selected = Batches(late, {}), scored()
    batches.start(selected, step=0)
    batches.pause()
    assert late.has(0)
    assert numbers(batches.make(selected, step=0, device=CPU)["image"]) == [-7, -2, -5, 0]
    batches.start(selected, step=1)
    batches.forget()
    assert not late.has(1)


def test_only_train_views_of_a_selection_made_on_cuda_need_two_super_batches_ahead(
    late: LateViews,
) -> None:
    cuda = torch.device("cuda")
    assert [Batches(late, {}).lookahead(device) for device in (CPU, cuda)] == [1, 2]
    assert [Batches(None, {}).lookahead(device) for device in (CPU, cuda)] == [1, 1]


def test_without_train_views_there_is_nothing_to_open_pause_or_forget() -> None:
    batches = Batches(None, {})
    batches.open(), batches.start(scored(), step=0), batches.pause(), batches.forget()
    assert batches.make(scored(), step=0, device=CPU)["key"] == ["0-7", "0-2", "0-5", "0-0"]


def small_half() -> TwoSizes:
    """Leaves places 1 and 3 of the draw order small, 4 px of 8."""
    return TwoSizes(0.5, 4, ScoringConfig(image_size=4))


def test_a_batch_of_two_sizes_holds_each_of_the_chosen_once() -> None:
    batch = Batches(None, {}, small_half()).make(scored(), step=0, device=CPU)
    assert batch["key"] == ["0-7", "0-5"] and batch["small_key"] == ["0-2", "0-0"]
    assert numbers(batch["image"]) == numbers(batch["text"]) == [7, 5]
    assert numbers(batch["small_image"]) == numbers(batch["small_text"]) == [2, 0]
    assert batch["image"].shape[2:] == (8, 8) and batch["small_image"].shape[2:] == (4, 4)
    assert batch["weight"].tolist() == [0.5, 1.25]
    assert batch["small_weight"].tolist() == [1.5, 0.75]


def test_no_train_view_is_made_for_the_small(late: LateViews, negated: Negated) -> None:
    batch = Batches(late, {}, small_half()).make(scored(), step=0, device=CPU)
    assert numbers(batch["image"]) == [-7, -5] and numbers(batch["small_image"]) == [2, 0]
    assert negated.num_calls == 2


def with_reference(super_batch: SuperBatch) -> SuperBatch:
    """The same, with the number of each candidate as its reference embeddings, and minus it."""
    rows = torch.arange(10.0)[:, None].expand(10, 4)
    put_view(super_batch.columns, REFERENCE, {"image": rows, "text": -rows})
    return super_batch


def both_towers(rows: Columns) -> dict[str, Tensor]:
    return {"image": rows[f"{REFERENCE}/image"], "text": rows[f"{REFERENCE}/text"]}


def test_the_reference_of_the_chosen_comes_with_them() -> None:
    batches = Batches(None, {}, reference_of=both_towers)
    batch = batches.make(scored(with_reference(candidates())), step=0, device=CPU)
    assert numbers(batch["reference"]["image"]) == [7, 2, 5, 0]
    assert numbers(batch["reference"]["text"]) == [-7, -2, -5, 0]


def test_each_size_has_the_reference_of_its_own_rows() -> None:
    batches = Batches(None, {}, small_half(), both_towers)
    made = batches.make(scored(with_reference(candidates())), step=0, device=CPU)
    batch = structured(made, as_dict=True)
    assert numbers(batch["reference"]["image"]) == [7, 5]
    assert numbers(batch["small_reference"]["image"]) == [2, 0]


def booked(selected: ScoredSuperBatch, *, step: int = 0, metrics: Metrics | None = None) -> Metrics:
    metrics = metrics or Metrics()
    book(metrics, selected, Batches(None, {}).make(selected, step=step, device=CPU), step=step)
    return metrics


def test_a_batch_handed_out_is_counted_with_its_candidates() -> None:
    found = booked(scored()).as_dict()
    names = ("steps", "samples_read", "samples_trained", "super_batch_duplicates")
    assert [found[name] for name in names] == [1, 10, 4, 0]
    assert (found["effective_support"], found["selected_score"]) == (6.0, 1.5)


def test_candidates_that_came_twice_are_counted_as_duplicates() -> None:
    """A super-batch of 14 takes all of the shard, and its first 4 again."""
    assert booked(scored(candidates(14))).as_dict()["super_batch_duplicates"] == 4


@pytest.mark.parametrize(("weights_step", "staleness"), [(5, 0), (3, 2), (None, math.nan)])
def test_staleness_is_the_steps_since_the_weights_that_scored(
    weights_step: int | None, staleness: float
) -> None:
    found = booked(scored(weights_step=weights_step), step=5).as_dict()["staleness"]
    assert found == pytest.approx(staleness, nan_ok=True)


def test_each_group_is_counted_with_its_distance_from_its_quota() -> None:
    metrics = Metrics(groups=["cat", "dog"])
    for _ in range(2):
        booked(scored(groups=([3, 1], [1, -2])), metrics=metrics)
    found = metrics.as_dict()
    assert [found[f"selected/{group}"] for group in ("cat", "dog")] == [6, 2]
    assert [found[f"quota_overrun/{group}"] for group in ("cat", "dog")] == [2, 0]
    assert [found[f"quota_shortfall/{group}"] for group in ("cat", "dog")] == [0, 4]


def test_examples_left_out_and_the_counts_of_the_source_are_added_up() -> None:
    super_batch = replace(candidates(), skipped={"decode": 2, "size": 1}, counts={"retries": 3})
    metrics = booked(scored(super_batch))
    book_skipped(metrics, super_batch)
    found = metrics.as_dict()
    assert [found[f"skipped/{reason}"] for reason in ("decode", "size")] == [4, 2]
    assert (found["samples_skipped"], found["retries"]) == (6, 6)
