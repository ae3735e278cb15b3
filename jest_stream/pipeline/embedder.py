"""What learner and reference say of a super-batch: its columns in, `Embeddings` out.

Owns the learner copy and the reference, or reads its cache. Runs in the training thread, without
gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jest_stream.config import ScoringConfig
from jest_stream.errors import ConfigError, ScoringMemoryError
from jest_stream.metrics import Metrics, Model, Pass
from jest_stream.pipeline.device import Ring, Slot
from jest_stream.pipeline.models import Models
from jest_stream.scoring import Input, LearnerCopy, Pixels, ReferenceModel, embed_once, two_tower
from jest_stream.types import Embeddings
from jest_stream.views import REFERENCE, Columns, PixelTable, scaled, tensors_of


class Embedder:
    """Embeds candidates with the models of a run.

    Args:
      models: what there is of learner and reference.
      scoring: how they embed.
      refresh_every: steps between copies of the learner's weights.
      metrics: where rows are counted.
      finishes: what is left to do to pixels, by the name of their view.
    """

    def __init__(
        self,
        models: Models,
        *,
        scoring: ScoringConfig,
        refresh_every: int,
        metrics: Metrics,
        finishes: Mapping[str, PixelTable],
    ) -> None:
        self._models = models
        self._scoring = scoring
        self._refresh_every = refresh_every
        self._metrics = metrics
        self._finishes = finishes
        self._has_table: set[str] = set()  # views whose finish has a table on the device
        self._micro_batch_size = scoring.micro_batch_size  # smaller once memory has run out
        self._copy: LearnerCopy | None = None
        self._reference: ReferenceModel | None = None
        self._restored: dict[str, Any] | None = None  # a checkpoint's copy, until ours is made
        self._has_failed = False  # the learner may have been mended since: copy it anew
        self.ring = Ring(torch.device("cpu"))
        """Where scoring runs. To be set before the first candidates."""

    @property
    def weights_step(self) -> int | None:
        """The step whose learner weights the copy holds; None without a copy."""
        return None if self._copy is None else self._copy.step

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

    def prepare(self, columns: Columns) -> None:
        """Has ready what embeds these columns, by work on the caller's current stream."""
        unmade = [
            name for name in self._finishes if name in columns and name not in self._has_table
        ]
        if unmade:  # batches use the tables too, on the caller's stream
            with self.ring.writing(None):
                for name in unmade:
                    self._finishes[name].table(columns[name].shape[1], self.ring.device)
            self._has_table.update(unmade)
        if self._models.reference is not None and self._reference is None:
            with self.ring.writing(None, two_tower(self._models.reference).device):
                self._reference = ReferenceModel(
                    self._models.reference,
                    device=self.ring.device,
                    learner=self._models.learner,
                    scoring=self._scoring,
                )

    @contextmanager
    def at_work(self, slot: Slot) -> Iterator[None]:
        """Queues what the block does behind the slot's columns and the weights."""
        self._has_failed = True
        with slot.scoring(None if self._copy is None else self._copy.read_now):
            yield
        self._has_failed = False

    def embed(self, columns: Columns) -> tuple[Embeddings | None, Embeddings | None]:
        """Returns what learner copy and reference make of the candidates; None without one.

        Where memory runs out, it goes on in smaller parts from then on.

        Raises:
          ScoringMemoryError: if there is too little for a single candidate.
        """
        while True:
            try:
                return self._embed_learner(columns), self._embed_reference(columns)
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

    def add_reference(
        self, columns: Columns, slot: Slot, reference: Embeddings | None = None
    ) -> None:
        """Puts the reference's embeddings among the columns, unless a cache has put them there.

        Args:
          columns: of the candidates; the slot keeps what is added.
          slot: theirs.
          reference: what the reference made of them. None: it is asked now.
        """
        if self._models.cache is not None:
            return
        if reference is None:
            reference = self._embed_reference(columns)
        assert reference is not None
        for name in ("image", "text"):
            kept = slot.keep_rows(f"{REFERENCE}/{name}", getattr(reference, name))
            columns[f"{REFERENCE}/{name}"] = kept

    def reference_of(self, rows: Columns) -> dict[str, Tensor]:
        """Returns the reference's embeddings in some rows of the columns, and its scale and bias.

        `image` and `text` are `[b, D]` float32 with unit-norm rows.
        """
        image, text = rows[f"{REFERENCE}/image"], rows[f"{REFERENCE}/text"]
        if self._models.cache is not None:
            found = self._models.cache.embeddings(image, text)
            scale, bias = found.logit_scale, found.logit_bias
            image, text = found.image, found.text
        else:
            assert self._reference is not None
            scale, bias = self._reference.scale_and_bias
        return {
            "image": image,
            "text": text,
            "logit_scale": torch.as_tensor(scale, dtype=torch.float32, device=image.device),
            "logit_bias": torch.as_tensor(bias, dtype=torch.float32, device=image.device),
        }

    def price(self) -> None:
        """Measures what the forward passes that were counted cost, where that is not known yet."""
        accounting = self._metrics.accounting
        if not accounting.is_unpriced:
            return
        passes: dict[Model, Pass] = {}
        dtype, trained = self._scoring.autocast_dtype, self._models.trained
        if self._copy is not None:
            passes["learner"] = partial(self._copy.embed, autocast_dtype=dtype)
        elif trained is not None:  # what is trained at the score size, if anything is
            passes["learner"] = partial(_embed_at_score_size, trained, self._scoring)
        if self._reference is not None:
            passes["reference"] = partial(self._reference.embed, autocast_dtype=dtype)
        else:  # asked before a resume, and not since
            reference = self._models.reference
            passes["reference"] = partial(_embed_by_reference, reference, self._scoring)
        if trained is not None:
            passes["trained"] = partial(embed_once, trained)
        self._metrics.price(passes)

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
        self._models.release()

    def _make_copy(self, learner: nn.Module, step: int) -> None:
        with self.ring.writing(None, two_tower(learner).device):
            made = LearnerCopy(
                learner,
                refresh_every=self._refresh_every,
                device=self.ring.device,
                step=step,
                has_spare=self.ring.backend.overlaps,
                scoring=self._scoring,
            )
            if self._restored is not None:
                made.load_state_dict(self._restored)
            self._copy, self._restored = made, None  # only now, when it holds what it should

    def _embed_learner(self, columns: Columns) -> Embeddings | None:
        if self._copy is None:
            return None
        image, text = self._scored_view(columns, "image"), tensors_of(columns, "text", "scoring")
        found = self._copy.embed(
            image,
            text,
            micro_batch_size=self._micro_batch_size,
            autocast_dtype=self._scoring.autocast_dtype,
        )
        self._metrics.accounting.count_scored("learner", _shaped(image), _shaped(text))
        return found

    def _embed_reference(self, columns: Columns) -> Embeddings | None:
        if self._models.cache is not None:
            return self._models.cache.embeddings(
                columns[f"{REFERENCE}/image"], columns[f"{REFERENCE}/text"]
            )
        if self._reference is None:
            return None
        # A view of its own, or else the one that it shares with the learner.
        own_image, own_text = _has(columns, "reference_image"), _has(columns, "reference_text")
        image = self._scored_view(columns, "reference_image" if own_image else "image")
        text = tensors_of(columns, "reference_text" if own_text else "text", "scoring")
        found = self._reference.embed(
            image,
            text,
            micro_batch_size=self._micro_batch_size,
            autocast_dtype=self._scoring.autocast_dtype,
        )
        self._metrics.accounting.count_scored("reference", _shaped(image), _shaped(text))
        return found

    def _scored_view(self, columns: Columns, name: str) -> Input:
        """A view at the size that is scored; of uint8 pixels, what is left to do to each slice."""
        view = tensors_of(columns, name, "scoring")
        side, finish = self._scoring.image_size, self._finishes.get(name)
        if finish is None or not isinstance(view, Tensor) or view.dtype != torch.uint8:
            return scaled(view, side)
        size = tuple(view.shape[2:]) if side is None else (side, side)
        return Pixels(view, lambda rows: scaled(finish(rows), side), size)


def _embed_at_score_size(
    learner: nn.Module, scoring: ScoringConfig, image: Input, text: Input
) -> Embeddings:
    return LearnerCopy(learner, refresh_every=1, scoring=scoring).embed(image, text)


def _embed_by_reference(
    reference: nn.Module | None, scoring: ScoringConfig, image: Input, text: Input
) -> Embeddings:
    if reference is None:
        raise ConfigError("the run that was resumed had a live reference, this one has none.")
    return ReferenceModel(reference, scoring=scoring).embed(image, text)


def _shaped(view: Input) -> Tensor | Mapping[str, Tensor]:
    """What tells how many rows there are, and of which shapes."""
    return view.shaped if isinstance(view, Pixels) else view


def _has(columns: Columns, name: str) -> bool:
    return any(key.split("/")[0] == name for key in columns)
