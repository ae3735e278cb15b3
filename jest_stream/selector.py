"""A super-batch in, the chosen rows out: embeds the score views and runs the selection rule.

Owns the learner copy and the reference. Runs in the training thread, without gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from jest_stream.caching import ReferenceCache
from jest_stream.config import ScoringConfig, SelectionConfig, TargetSimilarity
from jest_stream.errors import ConfigError
from jest_stream.reporting.metrics import Metrics
from jest_stream.scoring.encoders import Input, has_bias, two_tower
from jest_stream.scoring.learner import LearnerCopy
from jest_stream.scoring.reference import ReferenceModel
from jest_stream.selection import (
    DrawRule,
    Groups,
    independent_selection,
    joint_selection,
    needs,
    target_similarity,
    uniform_selection,
)
from jest_stream.superbatch import take_rows
from jest_stream.types import Embeddings, Selection
from jest_stream.views import Columns, view_of


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
        needs_learner, needs_reference = (False, False)
        if config.method != "uniform":
            needs_learner, needs_reference = needs(config.score)
            if any(isinstance(term, TargetSimilarity) for term in config.terms):
                needs_reference = True
                if reference is None:
                    raise ConfigError(
                        "reference=None, but TargetSimilarity compares examples with targets by "
                        "their reference embeddings: pass the model that embedded the targets as "
                        "reference=."
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
        self.loss = config.loss
        model = self.learner if self.learner is not None else self.reference
        if config.loss == "auto" and model is not None:
            self.loss = "sigmoid" if has_bias(model) else "softmax"
        elif config.loss == "auto" and self.cache is not None:
            self.loss = "sigmoid" if self.cache.has_bias else "softmax"
        self.home = next((m for m in (learner, reference) if isinstance(m, nn.Module)), None)
        """The module on whose device batches are wanted."""

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
        self.learner = self.reference = self.cache = self.home = None


class Selector:
    """Chooses sub-batches by the rule of a `SelectionConfig`."""

    def __init__(
        self,
        config: SelectionConfig,
        models: Models,
        *,
        scoring: ScoringConfig,
        refresh_every: int,
        metrics: Metrics,
        yields_reference: bool = False,
    ) -> None:
        self._yields_reference = yields_reference
        # What `reference_of` takes rows of: the columns scored last, and their embeddings.
        self._embedded: tuple[Columns, Embeddings] | None = None
        self._config = config
        self._scoring = scoring
        self._models = models
        self._refresh_every = refresh_every
        self.device = torch.device("cpu")
        """Where scoring runs. To be set before the first choice."""
        self._metrics = metrics
        self._copy: LearnerCopy | None = None
        self._reference: ReferenceModel | None = None
        self._restored: dict[str, Any] | None = None  # a checkpoint's copy, until ours is made
        self._has_failed = False  # the learner may have been mended since: copy it anew

    @property
    def weights_step(self) -> int | None:
        """The step whose learner weights the copy holds; None without a copy."""
        return None if self._copy is None else self._copy.step

    @property
    def groups(self) -> list[str]:
        """Names of the groups that have a quota, in order."""
        return [str(group) for group in self._config.quotas or ()]

    @property
    def is_reference_cached(self) -> bool:
        """Whether the reference's embeddings are read, so that its forward pass costs nothing."""
        return self._models.cache is not None

    def refresh(self, step: int, *, force: bool = False) -> None:
        """Copies the learner's weights if `step` is one of the promised steps, or if forced.

        The first call makes the copy: the learner may have been moved or wrapped until then.
        """
        if self._models.learner is None:
            return
        if self._copy is None:
            self._copy = LearnerCopy(
                self._models.learner,
                refresh_every=self._refresh_every,
                device=self.device,
                step=step,
            )
            if self._restored is not None:
                self._copy.load_state_dict(self._restored)
                self._restored = None
        self._copy.refresh(step, force=force or self._has_failed)

    def choose(
        self, columns: Columns, *, size: int, batch_size: int, key: int, step: int, now: int
    ) -> tuple[Selection, int | None]:
        """Returns which of the `size` candidates make the sub-batch of `step`.

        Args:
          columns: score views of the candidates, on the scoring device.
          key: names the run's noise; with `step` and an example's position it names a draw.
          now: the step at hand, whose learner weights are copied if they are due.

        Returns:
          The choice, and the step of the learner weights behind it; None without a learner.
        """
        if self._config.method == "uniform" or size == batch_size:  # nothing to choose by score
            uniform = uniform_selection(
                size,
                batch_size=batch_size,
                groups=self._groups(columns),
                key=key,
                step=step,
                device=self.device,
            )
            return uniform, None
        self.refresh(now)
        self._has_failed = True
        selection = self._choose_scored(columns, size, batch_size, key, step)
        self._has_failed = False
        return selection, None if self._copy is None else self._copy.step

    def reference_of(self, columns: Columns, size: int, selection: Selection) -> Embeddings | None:
        """Returns the reference's embeddings of the chosen, `[b, D]`; None unless asked for.

        The same ones whether the choice was made just now or comes from a checkpoint: candidates
        that were scored are embedded in the same micro-batches again.

        Args:
          columns: score views of the candidates, on the scoring device.
          size: how many candidates there are.
          selection: which of them were chosen.
        """
        if not self._yields_reference:
            return None
        indices = selection.indices
        is_scored = self._config.method != "uniform" and size != len(indices)
        embedded, self._embedded = self._embedded, None
        if self.is_reference_cached or not is_scored:
            return self._embed_reference(take_rows(columns, indices))
        if embedded is None or embedded[0] is not columns:
            embedded = columns, self._embed_reference(columns)
        reference = embedded[1]
        return replace(reference, image=reference.image[indices], text=reference.text[indices])

    def _choose_scored(
        self, columns: Columns, size: int, batch_size: int, key: int, step: int
    ) -> Selection:
        config = self._config
        with self._metrics.timed("scoring"):
            learner, reference = self._embed(columns)
        self._metrics.count("samples_scored", size)
        with self._metrics.timed("selecting"):
            rule = DrawRule(
                gain=config.gain,
                effective_support=config.effective_support,
                terms=self._terms(columns, reference),
                uniform_fraction=config.uniform_fraction,
                groups=self._groups(columns),
            )
            if config.method == "independent":
                return independent_selection(
                    learner,
                    reference,
                    batch_size=batch_size,
                    score=config.score,
                    loss=self._models.loss,
                    rule=rule,
                    key=key,
                    step=step,
                )
            return joint_selection(
                learner,
                reference,
                batch_size=batch_size,
                num_chunks=min(config.num_chunks, batch_size),
                num_sweeps=config.num_sweeps,
                score=config.score,
                loss=self._models.loss,
                rule=rule,
                key=key,
                step=step,
            )

    def _groups(self, columns: Columns) -> Groups | None:
        quotas = self._config.quotas
        return None if quotas is None else Groups(columns["group"], quotas)

    def _terms(self, columns: Columns, reference: Embeddings | None) -> Tensor | None:
        """Returns the sum of the terms of each candidate: `[B]`; None without any."""
        total: Tensor | None = columns.get("term")
        for term in self._config.terms:
            if not isinstance(term, TargetSimilarity):
                continue
            assert reference is not None
            rows = reference.image if term.tower == "image" else reference.text
            targets = term.targets.to(rows.device, non_blocking=True)
            found = term.weight * target_similarity(rows, targets, norm=term.norm)
            total = found if total is None else total + found
        return total

    def copy_state(self) -> dict[str, Any] | None:
        """Returns the learner copy's weights for a checkpoint, None if there is no copy."""
        return self._restored if self._copy is None else self._copy.state_dict()

    def load_copy_state(self, state: dict[str, Any] | None) -> None:
        """Takes the weights of a checkpoint; None has the copy made anew."""
        self._restored = state
        self._copy = None

    def close(self) -> None:
        """Lets go of the copy and of the models."""
        self._copy = self._reference = self._restored = None
        self._models.release()

    def _embed(self, columns: Columns) -> tuple[Embeddings | None, Embeddings | None]:
        learner = reference = None
        if self._copy is not None:
            image, text = _scorable(columns, "image"), _scorable(columns, "text")
            size, dtype = self._scoring.micro_batch_size, self._scoring.autocast_dtype
            learner = self._copy.embed(image, text, micro_batch_size=size, autocast_dtype=dtype)
        if self._models.reference is not None or self.is_reference_cached:
            reference = self._embed_reference(columns)
            if self._yields_reference:
                self._embedded = columns, reference
        return learner, reference

    def _embed_reference(self, columns: Columns) -> Embeddings:
        """Returns the reference's embeddings of candidates, from the cache if there is one."""
        if self._models.cache is not None:
            return self._models.cache.embeddings(
                columns["reference_embeddings/image"], columns["reference_embeddings/text"]
            )
        assert self._models.reference is not None
        if self._reference is None:
            self._reference = ReferenceModel(
                self._models.reference, device=self.device, learner=self._models.learner
            )
        has_own = [_has_own(columns, f"reference_{name}") for name in ("image", "text")]
        return self._reference.embed(
            _scorable(columns, "reference_image" if has_own[0] else "image"),
            _scorable(columns, "reference_text" if has_own[1] else "text"),
            micro_batch_size=self._scoring.micro_batch_size,
            autocast_dtype=self._scoring.autocast_dtype,
        )


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


def _scorable(columns: Columns, name: str) -> Input:
    view = view_of(columns, name)
    if isinstance(view, list):
        raise ConfigError(
            f"{name} of example {columns['key'][0]!r} is a {type(view[0]).__name__}, but scoring "
            f"takes tensors. Pass tokenizer=, a function that turns the text into one."
        )
    return view


def _has_own(columns: Columns, name: str) -> bool:
    """Whether the reference has a view of its own; else it shares the learner's."""
    return any(key == name or key.startswith(name + "/") for key in columns)
