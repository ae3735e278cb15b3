"""Opens and checks the models of a run: the learner, and a reference by module, name or cache.

`open_reference` turns the user's `reference=` into a model with its views; `Models` keeps the
modules that the selection rule needs. Both only check, when the dataset is made: nothing is moved,
copied or run yet.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn

from jest_stream.config import (
    Loss,
    SelectionConfig,
    StorageConfig,
    TargetSimilarity,
    Transform,
    ViewConfig,
)
from jest_stream.errors import ConfigError
from jest_stream.reference_cache import ReferenceCache
from jest_stream.scoring import has_bias, is_named, load_reference, two_tower
from jest_stream.selection import needs
from jest_stream.storage import check_address, scheme_of


class Reference(NamedTuple):
    """A reference, and the views that are made for it alone."""

    model: nn.Module | ReferenceCache | None
    transform: Transform | None
    """None where the reference shares the learner's view of the image, and for a cache."""
    tokenizer: Transform | None
    """None likewise, of the text."""


def open_reference(
    reference: nn.Module | ReferenceCache | str | os.PathLike[str] | None,
    *,
    views: ViewConfig,
    storage: StorageConfig | None,
    opened: ExitStack,
) -> Reference:
    """Returns the reference that `reference` stands for.

    Args:
      reference: a module, a `ReferenceCache`, the address of one, the name of a model (see
        `scoring.load_reference`), or None.
      views: the user's, with those that a cache must have been built with.
      storage: how a cache is read.
      opened: closes a cache that is opened here.

    Raises:
      ConfigError: for an address that holds neither a cache nor a model.
      ReferenceMismatchError: for a cache that was built with other views.
    """
    # There are four cases:
    # 1. The name of a model, or a folder that holds one: it brings its own views, unless the user
    #    gave others.
    # 2. Any other address: that of a cache. It is opened here, and is then case 3.
    # 3. A cache: no reference runs, so no views are made for it. Views that the user gave are
    #    those that the cache must have been built with.
    # 4. A module or None. Objects that are no model are refused where one is needed, by `Models`.
    if isinstance(reference, str | os.PathLike):
        if is_named(reference):
            named = load_reference(reference)
            return Reference(
                named.module,
                views.reference_transform or named.transform,
                views.reference_tokenizer or named.tokenizer,
            )
        reference = _open_cache(os.fspath(reference), storage)
        opened.callback(reference.close)
    if isinstance(reference, ReferenceCache):
        given = {"transform": views.reference_transform, "tokenizer": views.reference_tokenizer}
        reference.check({name: view for name, view in given.items() if view is not None})
        reference.check_keys(views.image_key, views.text_key)
        return Reference(reference, None, None)
    return Reference(reference, views.reference_transform, views.reference_tokenizer)


def _open_cache(path: str, storage: StorageConfig | None) -> ReferenceCache:
    address = check_address(path)
    # A missing local path may be a model's name mistyped: say so instead of "no such folder".
    if not scheme_of(address) and not os.path.exists(address):
        raise ConfigError(
            f"reference={path!r} is no folder of a reference cache, no model folder, and no name "
            f"such as 'open_clip:ViT-B-32/laion2b_s34b_b79k'. A cache is built with jest-stream "
            f"cache SOURCE --reference NAME --out {path}"
        )
    return ReferenceCache(path, storage=storage)


class Models:
    """The modules that a selection rule needs, checked; those that it does not need are None.

    Args:
      config: the rule.
      learner: the module being trained.
      reference: of `open_reference`.
      with_reference: whether batches have the reference's embeddings, needed by the rule or not.

    Raises:
      ConfigError: if a module that is needed is missing or cannot embed.
    """

    def __init__(
        self,
        config: SelectionConfig,
        learner: nn.Module | None,
        reference: nn.Module | ReferenceCache | None,
        *,
        with_reference: bool = False,
    ) -> None:
        selects = config.method != "uniform"
        scores_learner, scores_reference = needs(config.score) if selects else (False, False)
        compares = selects and any(isinstance(term, TargetSimilarity) for term in config.terms)
        # The reference is needed in three cases:
        # 1. The score is made of its losses.
        # 2. A term compares its embeddings with targets.
        # 3. The batch has its embeddings.
        if compares and reference is None:
            raise ConfigError(
                "reference=None, but TargetSimilarity compares examples with targets by their "
                "reference embeddings: pass the model that embedded the targets as reference=."
            )
        if with_reference and reference is None and not scores_reference:
            raise ConfigError(
                "with_reference=True yields the reference's embeddings, but reference=None: "
                "pass a reference, or a cache of one."
            )
        self.learner = _checked(learner, "learner", config) if scores_learner else None
        self.reference: nn.Module | None = None
        self.cache: ReferenceCache | None = None
        """Where the reference's embeddings are read, instead of made by `reference`."""
        if scores_reference or compares or with_reference:
            if isinstance(reference, ReferenceCache):
                self.cache = reference
            else:
                self.reference = _checked(reference, "reference", config)
        scored = [self.learner, *((self.reference, self.cache) if scores_reference else ())]
        self.loss: Loss = _loss(config.loss, [model for model in scored if model is not None])
        modules = (module for module in (learner, reference) if isinstance(module, nn.Module))
        self._placed = next(modules, None)  # the module whose device batches go to
        self.trained = learner if isinstance(learner, nn.Module) else None
        """The module passed as learner, whether or not scoring needs it: its steps are priced."""

    def devices(
        self, device: torch.device | None, scoring_device: torch.device | None
    ) -> tuple[torch.device, torch.device]:
        """Returns where batches go and where scoring runs, by where the models are now.

        Args:
          device: the user's choice; None: the learner's, else the reference's, else the CPU.
          scoring_device: likewise; None: where batches go.
        """
        parameter = None if self._placed is None else next(self._placed.parameters(), None)
        if device is None:
            device = torch.device("cpu") if parameter is None else parameter.device
        return device, scoring_device or device

    def release(self) -> None:
        """Lets go of the modules: a closed dataset must not keep their memory."""
        self.learner = self.reference = self.cache = self._placed = self.trained = None


def _loss(loss: Loss, models: list[nn.Module | ReferenceCache]) -> Loss:
    """Returns the family of the pair losses of a score that is made of these models' losses."""
    if loss != "auto" or not models:
        return loss
    # The sigmoid loss needs a bias; in the softmax a bias cancels. So models of both kinds together
    # can be compared by the softmax only.
    biases = [
        model.has_bias if isinstance(model, ReferenceCache) else has_bias(model) for model in models
    ]
    return "sigmoid" if all(biases) else "softmax"


def _checked(module: nn.Module | None, role: str, config: SelectionConfig) -> nn.Module:
    if module is not None:
        two_tower(module, role=role)
        return module
    score = f"score={config.score!r}" if isinstance(config.score, str) else "a score of your own"
    other = "hard_learner" if role == "reference" else "easy_reference"
    raise ConfigError(
        f"{role}=None, but {score} compares pairs by a {role} model: pass one as {role}=. "
        f"SelectionConfig(score={other!r}) needs none, SelectionConfig(method='uniform') "
        f"needs no model at all."
    )
