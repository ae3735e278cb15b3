"""Everything that a `JESTDataset` was asked for, checked: what its pipeline is built from.

Opens the source; builds when ranks are known. Reads nothing by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from jest_stream.config import (
    Layout,
    Limits,
    ScoringConfig,
    SelectionConfig,
    StreamConfig,
    Term,
    as_device,
    require_bool,
    require_functions,
    require_key,
    require_one_of,
    require_rule,
    require_scoring,
    resolve_sizes,
)
from jest_stream.errors import ConfigError
from jest_stream.metrics import Metrics
from jest_stream.pipeline.batches import Batches
from jest_stream.pipeline.embedder import Embedder
from jest_stream.pipeline.models import Models, open_reference
from jest_stream.pipeline.schedule import Pipeline
from jest_stream.pipeline.selector import Selector
from jest_stream.pipeline.two_sizes import TwoSizes
from jest_stream.reference_cache import ReferenceCache
from jest_stream.sources import is_source, num_lanes, open_source
from jest_stream.views import (
    Key,
    LateViews,
    Recipe,
    ReducedDecoding,
    ScoreView,
    TrainView,
    TrainViewFrom,
    Transform,
    make_recipe,
)

_Settings = TypeVar("_Settings", StreamConfig, "Views")


@dataclass(frozen=True, kw_only=True)
class Views:
    """What the user wants made of an example; `JESTDataset` explains the fields."""

    image_key: Key
    text_key: Key
    transform: Transform | None
    tokenizer: Transform | None
    reference_transform: Transform | None
    reference_tokenizer: Transform | None
    train_transform: Transform | None
    train_view_from: TrainViewFrom
    reduced_decoding: ReducedDecoding
    limits: Limits | None

    def __post_init__(self) -> None:
        functions = "transform tokenizer reference_transform reference_tokenizer train_transform"
        require_functions({name: getattr(self, name) for name in functions.split()})
        require_key("image_key", self.image_key)
        require_key("text_key", self.text_key)
        require_one_of("train_view_from", self.train_view_from, ("auto", "encoded", "score_view"))
        require_one_of("reduced_decoding", self.reduced_decoding, ("auto", True, False))
        if self.limits is not None and not isinstance(self.limits, Limits):
            raise ConfigError(f"limits must be a Limits object or None, got {self.limits!r}")

    def recipe(self) -> Recipe:
        """Returns how the views are made, decided once."""
        names = ("transform", "reference_transform", "train_transform")
        return make_recipe(
            {name: getattr(self, name) for name in names},
            image_key=self.image_key,
            train_view_from=self.train_view_from,
            reduced_decoding=self.reduced_decoding,
        )

    def score_view(self, selection: SelectionConfig, recipe: Recipe) -> ScoreView:
        """Returns what makes the rows that candidates are scored on."""
        return ScoreView(
            keys=(self.image_key, self.text_key),
            learner=(recipe.transform, self.tokenizer),
            reference=(recipe.reference_transform, self.reference_tokenizer),
            keep_image=recipe.train_view_from == "encoded",
            terms=[term for term in selection.terms if isinstance(term, Term)],
            group_by=selection.group_by,
            limits=self.limits or Limits(),
            reduction=recipe.reduction,
        )

    def late_views(self, stream: StreamConfig, recipe: Recipe, *, rank: int) -> LateViews | None:
        """Returns what makes the image that is trained on; None where that is the score view."""
        if recipe.train_transform is None:
            return None
        view = TrainView(
            transform=recipe.train_transform,
            seed=stream.seed,
            rank=rank,
            is_of_score_view=recipe.train_view_from == "score_view",
            limits=self.limits or Limits(),
        )
        return LateViews(view, num_workers=stream.num_workers, timeout_s=stream.timeout_s)


class Plan:
    """The settings of a run, checked, and the source that was opened for it.

    Args:
      arguments: of `JESTDataset`, by name.

    Raises:
      ConfigError: for what cannot work.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        given = arguments
        selection, scoring = given["selection"], given["scoring"]
        self.selection = require_rule(SelectionConfig() if selection is None else selection)
        self.sizes = resolve_sizes(
            self.selection, given["batch_size"], given["filter_ratio"], given["super_batch_size"]
        )
        self.stream = _settings(StreamConfig, given)
        self._scoring = require_scoring(ScoringConfig() if scoring is None else scoring)
        self._devices = tuple(as_device(name, given[name]) for name in ("device", "scoring_device"))
        self._yields_reference = _checked_request(given["with_reference"], given["as_dict"])
        views = _settings(Views, given)
        with ExitStack() as opened:  # whatever fails below, what was opened before is closed
            reference = open_reference(
                given["reference"],
                transform=views.reference_transform,
                tokenizer=views.reference_tokenizer,
                keys=(views.image_key, views.text_key),
                storage=given["storage"],
            )
            if isinstance(reference.model, ReferenceCache) and reference.is_own:
                opened.callback(reference.model.close)
            self._views = replace(
                views,
                reference_transform=reference.transform,
                reference_tokenizer=reference.tokenizer,
            )
            self._recipe = self._views.recipe()
            self._two_sizes = TwoSizes.of(
                given["score_view_fraction"],
                self.sizes.batch_size,
                self._scoring,
                has_train_view=views.train_transform is not None,
                finish=self._recipe.finishes().get("image"),
            )
            self._models = Models(
                self.selection,
                given["learner"],
                reference.model,
                yields_reference=self._yields_reference,
            )
            self._source = open_source(given["source"], storage=given["storage"])
            if not is_source(given["source"]):
                opened.callback(self._source.close)
            if self._models.cache is not None:
                self._source = self._models.cache.join(self._source)
            self._opened = opened.pop_all()

    def build(self, metrics: Metrics, *, rank: int, world_size: int) -> Pipeline:
        """Returns what reads, scores and hands out on this rank."""
        stream, recipe = self.stream, self._recipe
        finishes = recipe.finishes()
        lanes = num_lanes(
            self._source.num_shards, self.sizes.stream_size * world_size, world_size, stream.lanes
        )
        embedder = Embedder(
            self._models,
            scoring=self._scoring,
            refresh_every=stream.refresh_every,
            metrics=metrics,
            finishes=finishes,
        )
        selector = Selector(
            self.selection,
            embedder,
            loss=self._models.loss,
            metrics=metrics,
            with_reference=self._yields_reference,
        )
        batches = Batches(
            self._views.late_views(stream, recipe, rank=rank),
            finishes,
            self._two_sizes,
            embedder.reference_of if self._yields_reference else None,
        )
        return Pipeline(
            stream,
            self.sizes,
            source=self._source,
            layout=Layout(num_lanes=lanes, rank=rank, world_size=world_size),
            score_view=self._views.score_view(self.selection, recipe),
            batches=batches,
            embedder=embedder,
            selector=selector,
            metrics=metrics,
            devices=lambda: self._models.devices(*self._devices),
        )

    def release(self) -> None:
        """Closes the source, unless the user passed a `Source`; lets go of the models."""
        self._opened.close()
        self._models.release()

    def describe(self) -> str:
        """Returns the rule and the sizes, for `repr`."""
        rule: str = self.selection.method
        if rule != "uniform":
            score = self.selection.score
            name = score if isinstance(score, str) else getattr(score, "__name__", "own score")
            rule = f"{rule} {name}, {self._models.loss} loss"
        return " | ".join([rule, str(self.sizes), *self._recipe.describe()])


def _settings(kind: type[_Settings], arguments: Mapping[str, Any]) -> _Settings:
    """Returns the settings whose fields are named as arguments are."""
    return kind(**{field.name: arguments[field.name] for field in fields(kind)})


def _checked_request(with_reference: object, as_dict: object) -> bool:
    """Returns whether batches are to have reference embeddings; they need a dict to be in."""
    if require_bool("with_reference", with_reference) and not as_dict:
        raise ConfigError(
            "with_reference=True adds an entry to the batch, but as_dict=False yields a pair "
            "(images, texts). Pass as_dict=True."
        )
    return bool(with_reference)
