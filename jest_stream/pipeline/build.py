"""Opens the inputs of a run, and builds its `Pipeline` from settings, source and models.

`open_inputs` opens the source and the reference when the dataset is made: mistakes show at once.
`build` wires the stages at the first use, when the ranks are known. Runs in the training
thread; no example is read here.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from jest_stream.config import Layout, RunSettings, Term
from jest_stream.metrics import Metrics
from jest_stream.pipeline.batches import Batches
from jest_stream.pipeline.models import Models, open_reference
from jest_stream.pipeline.schedule import Pipeline
from jest_stream.pipeline.selector import Selector
from jest_stream.pipeline.two_sizes import TwoSizes
from jest_stream.randomness import derive_seed
from jest_stream.reference_cache import ReferenceCache
from jest_stream.sources import is_source, num_lanes, open_source
from jest_stream.types import Source
from jest_stream.views import LateViews, Recipe, ScoreView, TrainView, make_recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """The source, the models and the views of a run, opened and checked. Alike on every rank."""

    source: Source
    """Joined with the reference cache, if there is one."""
    models: Models
    recipe: Recipe
    """How each view is made, decided once."""
    score_view: ScoreView
    two_sizes: TwoSizes | None
    """Leaves a part of each batch at the score view. None: all examples get the train view."""
    opened: ExitStack
    """Closes the source and the cache, unless they were the user's."""

    def close(self) -> None:
        """Closes the source and the cache that were opened here, and lets go of the models."""
        self.opened.close()
        self.models.release()


def open_inputs(
    settings: RunSettings,
    source: Any,
    *,
    learner: nn.Module | None,
    reference: nn.Module | ReferenceCache | str | os.PathLike[str] | None,
) -> RunInputs:
    """Returns the inputs of a run, opened.

    Args:
      settings: of the run.
      source: as `open_source` takes it.
      learner: the module being trained.
      reference: as `open_reference` takes it.

    Raises:
      ConfigError: for inputs that do not fit each other or the settings.
    """
    selection, views, batch = settings.selection, settings.views, settings.batch
    with ExitStack() as opened:  # if anything below fails, everything opened before is closed
        found = open_reference(reference, views=views, storage=settings.storage, opened=opened)
        recipe = make_recipe(
            {
                "transform": views.transform,
                "reference_transform": found.transform,
                "train_transform": views.train_transform,
            },
            image_key=views.image_key,
            train_view_from=views.train_view_from,
            reduced_decoding=views.reduced_decoding,
        )
        two_sizes = TwoSizes.of(
            batch.score_view_fraction,
            settings.sizes.batch_size,
            settings.scoring,
            has_train_view=views.train_transform is not None,
            pixel_table=recipe.pixel_tables().get("image"),
        )
        models = Models(selection, learner, found.model, with_reference=batch.with_reference)
        # Last, since it is the dearest: it may list a bucket or read a manifest of all shards.
        read = open_source(source, storage=settings.storage)
        if not is_source(source):
            opened.callback(read.close)
        score_view = ScoreView(
            keys=(views.image_key, views.text_key),
            learner=(recipe.transform, views.tokenizer),
            reference=(recipe.reference_transform, found.tokenizer),
            keep_image=recipe.train_view_from == "encoded",
            terms=[term for term in selection.terms if isinstance(term, Term)],
            group_by=selection.group_by,
            limits=views.limits,
            reduction=recipe.reduction,
        )
        inputs = RunInputs(
            source=read if models.cache is None else models.cache.join(read),
            models=models,
            recipe=recipe,
            score_view=score_view,
            two_sizes=two_sizes,
            opened=opened.pop_all(),  # nothing can fail any more
        )
    return inputs


def build(
    settings: RunSettings, inputs: RunInputs, metrics: Metrics, *, rank: int, world_size: int
) -> Pipeline:
    """Returns the pipeline that reads, scores and hands out on this rank."""
    stream, batch = settings.stream, settings.batch
    recipe, models, pixel_tables = inputs.recipe, inputs.models, inputs.recipe.pixel_tables()
    # Lanes are dealt to all ranks together: a super-batch of all W ranks, W * B examples, takes
    # equally many of each lane.
    global_size = settings.sizes.stream_size * world_size
    lanes = num_lanes(inputs.source.num_shards, global_size, world_size, stream.lanes)
    selector = Selector(
        settings.selection,
        models,
        scoring=settings.scoring,
        refresh_every=stream.refresh_every,
        pixel_tables=pixel_tables,
        # By rank, since each rank selects among candidates of its own.
        key=derive_seed("selection", stream.seed, rank),
        metrics=metrics,
        with_reference=batch.with_reference,
    )
    batches = Batches(
        _late_views(settings, recipe, rank=rank),
        pixel_tables,
        inputs.two_sizes,
        selector.reference_of if batch.with_reference else None,
    )
    return Pipeline(
        stream,
        settings.sizes,
        source=inputs.source,
        layout=Layout(num_lanes=lanes, rank=rank, world_size=world_size),
        score_view=inputs.score_view,
        batches=batches,
        selector=selector,
        metrics=metrics,
        # Asked later: the user may move the learner between now and the first batch.
        devices=lambda: models.devices(settings.device, settings.scoring_device),
    )


def _late_views(settings: RunSettings, recipe: Recipe, *, rank: int) -> LateViews | None:
    """Returns the maker of train views; None where the score view is trained on."""
    if recipe.train_transform is None:
        return None
    stream = settings.stream
    view = TrainView(
        transform=recipe.train_transform,
        seed=stream.seed,
        rank=rank,
        is_of_score_view=recipe.train_view_from == "score_view",
        limits=settings.views.limits,
    )
    return LateViews(view, num_workers=stream.num_workers, timeout_s=stream.timeout_s)


def describe(settings: RunSettings, inputs: RunInputs) -> str:
    """Returns the rule, the sizes and the decisions about views, for `repr`."""
    rule: str = settings.selection.method
    if rule != "uniform":
        score = settings.selection.score
        name = score if isinstance(score, str) else getattr(score, "__name__", "own score")
        rule = f"{rule} {name}, {inputs.models.loss} loss"
    return " | ".join([rule, str(settings.sizes), *inputs.recipe.describe()])
