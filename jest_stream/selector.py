"""A super-batch in, the chosen rows out: embeds the score views and runs the selection rule.

Owns the learner copy and the reference. Runs in the training thread, without gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jest_stream.config import ScoringConfig, SelectionConfig, TargetSimilarity
from jest_stream.errors import ConfigError, ScoringMemoryError
from jest_stream.reporting.metrics import Metrics
from jest_stream.scoring.choice import Choice
from jest_stream.scoring.encoders import Input, Pixels, has_bias, two_tower
from jest_stream.scoring.learner import LearnerCopy
from jest_stream.scoring.reference import ReferenceModel
from jest_stream.scoring.streams import Ring, Slot, moved
from jest_stream.selection import (
    DrawRule,
    Groups,
    independent_selection,
    joint_selection,
    needs,
    target_similarity,
    uniform_selection,
)
from jest_stream.types import Embeddings, Selection
from jest_stream.views import Columns, Finish, scaled, view_of


class Models:
    """The modules that a selection rule needs, checked; those it does not need are None."""

    def __init__(
        self, config: SelectionConfig, learner: nn.Module | None, reference: nn.Module | None
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
        self.learner = _checked(learner, "learner", config) if needs_learner else None
        self.reference = _checked(reference, "reference", config) if needs_reference else None
        self.loss = config.loss
        model = self.learner if self.learner is not None else self.reference
        if model is not None and config.loss == "auto":
            self.loss = "sigmoid" if has_bias(model) else "softmax"
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
        self.learner = self.reference = self.home = None


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
        finishes: Mapping[str, Finish] | None = None,
    ) -> None:
        self._config = config
        self._scoring = scoring
        self._models = models
        self._refresh_every = refresh_every
        self.ring = Ring(torch.device("cpu"))
        """Where scoring runs. To be set before the first choice."""
        self._metrics = metrics
        self._micro_batch_size = scoring.micro_batch_size  # smaller once memory has run out
        self._targets: dict[int, Tensor] = {}  # of terms, on the device
        self._has_table: set[str] = set()
        self._finishes = finishes or {}  # what is left to do to pixels, by the name of their view
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

    def refresh(self, step: int, *, force: bool = False) -> None:
        """Copies the learner's weights if `step` is one of the promised steps, or if forced.

        The first call makes the copy: the learner may have been moved or wrapped until then.
        """
        if self._models.learner is None:
            return
        if self._copy is None:
            self._make_copy(self._models.learner, step)
        assert self._copy is not None
        if force or self._has_failed or self._copy.is_due(step):
            with self.ring.writing(self._copy.written_next, self._copy.home):
                self._copy.refresh(step, force=True)

    def _make_copy(self, learner: nn.Module, step: int) -> None:
        with self.ring.writing(None, two_tower(learner).device):
            self._copy = LearnerCopy(
                learner,
                refresh_every=self._refresh_every,
                device=self.ring.device,
                step=step,
                has_spare=self.ring.backend.overlaps,
                scoring=self._scoring,
            )
            if self._restored is not None:
                self._copy.load_state_dict(self._restored)
                self._restored = None

    def _prepare(self, columns: Columns, now: int) -> None:
        """Has all that scores ready, by work on the caller's current stream."""
        self.refresh(now)
        unmade = [
            name for name in self._finishes if name in columns and name not in self._has_table
        ]
        if unmade:  # batches use the tables too, on the caller's stream
            with self.ring.writing(None):
                for name in unmade:
                    self._finishes[name].table(columns[name].shape[1], self.ring.device)
            self._has_table.update(unmade)
        if self._models.reference is not None and self._reference is None:
            home = two_tower(self._models.reference).device
            with self.ring.writing(None, home):
                self._reference = ReferenceModel(
                    self._models.reference,
                    device=self.ring.device,
                    learner=self._models.learner,
                    scoring=self._scoring,
                )
                for number, term in enumerate(self._config.terms):
                    if isinstance(term, TargetSimilarity):
                        self._targets[number] = moved(term.targets, self.ring.device)

    def choose(
        self,
        columns: Columns,
        *,
        slot: Slot,
        size: int,
        batch_size: int,
        key: int,
        step: int,
        now: int,
    ) -> tuple[Choice, int | None]:
        """Returns which of the `size` candidates make the sub-batch of `step`.

        Args:
          columns: score views of the candidates, on the scoring device.
          slot: what keeps their memory.
          key: names the run's noise; with `step` and an example's position it names a draw.
          now: the step at hand, whose learner weights are copied if they are due.

        Returns:
          The choice, and the step of the learner weights behind it; None without a learner.
        """
        if self._config.method == "uniform" or size == batch_size:  # nothing to choose by score
            with slot.scoring():
                uniform = uniform_selection(
                    size,
                    batch_size=batch_size,
                    groups=self._groups(columns),
                    key=key,
                    step=step,
                    device=self.ring.device,
                )
                return slot.keep(uniform), None
        self._prepare(columns, now)
        self._has_failed = True
        with slot.scoring(None if self._copy is None else self._copy.read_now):
            choice = slot.keep(self._choose_scored(columns, slot, size, batch_size, key, step))
        self._has_failed = False
        return choice, None if self._copy is None else self._copy.step

    def _choose_scored(
        self, columns: Columns, slot: Slot, size: int, batch_size: int, key: int, step: int
    ) -> Selection:
        config = self._config
        with self._metrics.timed("scoring"), slot.timed("scoring"):
            learner, reference = self._embed(columns)
        self._metrics.count("samples_scored", size)
        with self._metrics.timed("selecting"), slot.timed("selecting"):
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
        for number, term in enumerate(self._config.terms):
            if not isinstance(term, TargetSimilarity):
                continue
            assert reference is not None
            rows = reference.image if term.tower == "image" else reference.text
            found = term.weight * target_similarity(rows, self._targets[number], norm=term.norm)
            total = found if total is None else total + found
        return total

    def copy_state(self) -> dict[str, Any] | None:
        """Returns the learner copy's weights for a checkpoint, None if there is no copy."""
        self.ring.drain()  # the copy may have been written to on another stream than the present
        return self._restored if self._copy is None else self._copy.state_dict()

    def load_copy_state(self, state: dict[str, Any] | None) -> None:
        """Takes the weights of a checkpoint; None has the copy made anew."""
        self.ring.drain()  # the copy may be in use
        self._restored = state
        self._copy = None

    def close(self) -> None:
        """Lets go of the copy and of the models."""
        self.ring.drain()
        self._copy = self._reference = self._restored = None
        self._targets.clear()
        self._models.release()

    def _embed(self, columns: Columns) -> tuple[Embeddings | None, Embeddings | None]:
        """Returns what the models say; in smaller parts, from now on, where memory runs out."""
        while True:
            try:
                return self._embed_by(self._micro_batch_size, columns)
            except torch.cuda.OutOfMemoryError as error:
                if self._micro_batch_size == 1:
                    raise ScoringMemoryError(
                        f"scoring one candidate at a time needs more memory than "
                        f"{self.ring.device} has left: {error} Leave more to scoring: a smaller "
                        f"training batch, a smaller score view, or scoring_device=, another device."
                    ) from error
            # Out of the handler, so that the error lets go of what it holds. Never above what the
            # super-batch fills, or the first halvings would change nothing.
            size = min(self._micro_batch_size, len(columns["key"]))
            self._micro_batch_size = max(1, size // 2)

    def _embed_by(self, size: int, columns: Columns) -> tuple[Embeddings | None, Embeddings | None]:
        image = self._scored_view(_scorable(columns, "image"), "image")
        text = _scorable(columns, "text")
        dtype = self._scoring.autocast_dtype
        learner = reference = None
        if self._copy is not None:
            learner = self._copy.embed(image, text, micro_batch_size=size, autocast_dtype=dtype)
        if self._reference is not None:
            if _has(columns, "reference_image"):  # a view of its own, else it shares the learner's
                image = self._scored_view(_scorable(columns, "reference_image"), "reference_image")
            if _has(columns, "reference_text"):
                text = _scorable(columns, "reference_text")
            reference = self._reference.embed(
                image, text, micro_batch_size=size, autocast_dtype=dtype
            )
        return learner, reference

    def _scored_view(self, view: Tensor | dict[str, Tensor], name: str) -> Input:
        """A view at the size that is scored; of uint8 pixels, what is left to do to each slice."""
        side, finish = self._scoring.image_size, self._finishes.get(name)
        if finish is None or not isinstance(view, Tensor) or view.dtype != torch.uint8:
            return scaled(view, side)
        size = tuple(view.shape[2:]) if side is None else (side, side)
        return Pixels(view, lambda rows: scaled(finish(rows), side), size)


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


def _scorable(columns: Columns, name: str) -> Tensor | dict[str, Tensor]:
    view = view_of(columns, name)
    if isinstance(view, list):
        raise ConfigError(
            f"{name} of example {columns['key'][0]!r} is a {type(view[0]).__name__}, but scoring "
            f"takes tensors. Pass tokenizer=, a function that turns the text into one."
        )
    return view


def _has(columns: Columns, name: str) -> bool:
    return any(key.split("/")[0] == name for key in columns)
