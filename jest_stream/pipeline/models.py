"""The models of a run, checked: what a selection rule needs of learner and reference."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import nn

from jest_stream.config import SelectionConfig, StorageConfig, TargetSimilarity
from jest_stream.errors import ConfigError
from jest_stream.reference_cache import ReferenceCache
from jest_stream.scoring import has_bias, is_named, load_reference, two_tower
from jest_stream.selection import needs
from jest_stream.storage import check_address, scheme_of
from jest_stream.views import Key, Transform


class Models:
    """The modules that a selection rule needs, checked; those it does not need are None."""

    def __init__(
        self,
        config: SelectionConfig,
        learner: nn.Module | None,
        reference: nn.Module | ReferenceCache | None,
        *,
        yields_reference: bool = False,
    ) -> None:
        """Raises `ConfigError` if a needed module is missing or cannot embed."""
        selects = config.method != "uniform"
        needs_learner, needs_reference = needs(config.score) if selects else (False, False)
        is_scored = needs_reference  # by its losses: not only yielded, or looked at by a term
        if selects and any(isinstance(term, TargetSimilarity) for term in config.terms):
            needs_reference = True
            if reference is None:
                raise ConfigError(
                    "reference=None, but TargetSimilarity compares examples with targets by their "
                    "reference embeddings: pass the model that embedded the targets as reference=."
                )
        if yields_reference and not needs_reference:
            needs_reference = True
            if reference is None:
                raise ConfigError(
                    "with_reference=True yields the reference's embeddings, but reference=None: "
                    "pass a reference, or a cache of one."
                )
        self.learner = _checked(learner, "learner", config) if needs_learner else None
        self.reference: nn.Module | None = None
        self.cache: ReferenceCache | None = None
        """Where the reference's embeddings are read instead of made."""
        if needs_reference and isinstance(reference, ReferenceCache):
            self.cache = reference
        elif needs_reference and not isinstance(reference, ReferenceCache):
            self.reference = _checked(reference, "reference", config)
        models = [self.learner, *((self.reference, self.cache) if is_scored else ())]
        biases = [_has_bias(model) for model in models if model is not None]
        self.loss = config.loss
        if config.loss == "auto" and biases:
            # The softmax of a model with a bias does without it; the sigmoid needs one.
            self.loss = "sigmoid" if all(biases) else "softmax"
        self.home = next((m for m in (learner, reference) if isinstance(m, nn.Module)), None)
        """The module on whose device batches are wanted."""
        self.trained = learner if isinstance(learner, nn.Module) else None
        """What the user trains, as far as we know, whether or not scoring needs it."""

    def devices(
        self, device: torch.device | None, scoring_device: torch.device | None
    ) -> tuple[torch.device, torch.device]:
        """Returns where batches go and where scoring runs, by where the models are now.

        Args:
          device: what the user asked for; None: the learner's, else the reference's, else the CPU.
          scoring_device: likewise; None: where batches go.
        """
        parameter = None if self.home is None else next(self.home.parameters(), None)
        if device is None:
            device = torch.device("cpu") if parameter is None else parameter.device
        return device, scoring_device or device

    def release(self) -> None:
        """Lets go of the modules."""
        self.learner = self.reference = self.cache = self.home = self.trained = None


def _has_bias(model: nn.Module | ReferenceCache) -> bool:
    return model.has_bias if isinstance(model, ReferenceCache) else has_bias(model)


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


class OpenReference(NamedTuple):
    """A reference, and how it is shown the examples."""

    model: nn.Module | ReferenceCache | None
    transform: Transform | None
    """The reference's own view; None: it shares the learner's, or needs none."""
    tokenizer: Transform | None
    is_own: bool
    """Whether it was opened here, and is to be closed with the dataset."""


def open_reference(
    reference: Any,
    *,
    transform: Transform | None,
    tokenizer: Transform | None,
    keys: tuple[Key, Key],
    storage: StorageConfig | None,
) -> OpenReference:
    """Returns the reference that `reference` stands for.

    Args:
      reference: a module, a `ReferenceCache`, the address of one, the name of a model (see
        `scoring.named`), or None.
      transform: what the user gave as the reference's own. With a cache it says what the cache
        must have been built with.
      tokenizer: likewise.
      keys: where an example's image and text are.
      storage: how a cache is read.

    Raises:
      ConfigError: for what is none of these.
      ReferenceMismatchError: for a cache that was built with other views.
    """
    is_own = isinstance(reference, str | os.PathLike)
    if is_own and is_named(reference):
        named = load_reference(reference)
        return OpenReference(
            named.module, transform or named.transform, tokenizer or named.tokenizer, is_own
        )
    if is_own:
        address = check_address(os.fspath(reference))
        if not scheme_of(address) and not os.path.exists(address):
            raise ConfigError(
                f"reference={os.fspath(reference)!r} is no folder of a reference cache, no model "
                f"folder, and no name such as 'open_clip:ViT-B-32/laion2b_s34b_b79k'. A cache is "
                f"built with jest-stream cache SOURCE --reference NAME --out {os.fspath(reference)}"
            )
        reference = ReferenceCache(reference, storage=storage)
    if isinstance(reference, ReferenceCache):
        expected = {"transform": transform, "tokenizer": tokenizer}
        try:
            reference.check({name: view for name, view in expected.items() if view is not None})
            reference.check_keys(*keys)
        except BaseException:
            if is_own:
                reference.close()
            raise
        return OpenReference(reference, None, None, is_own)
    return OpenReference(reference, transform, tokenizer, False)
