"""Embeds the columns of a super-batch with the learner copy and the reference of a run.

Owns the learner copy, and the reference model or the reading of its cache. Runs in the training
thread, without gradients. Shapes: B: super-batch size, b: batch size, D: embedding dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from jest_stream.config import ScoringConfig
from jest_stream.errors import ConfigError, ScoringMemoryError
from jest_stream.metrics import Metrics, Model, Pass
from jest_stream.pipeline.device import Ring
from jest_stream.pipeline.models import Models
from jest_stream.scoring import Input, LearnerCopy, Pixels, ReferenceModel, embed_once, two_tower
from jest_stream.types import Embeddings
from jest_stream.views import REFERENCE, Columns, PixelTable, scaled, tensors_of


class Embedder:
    """Embeds candidates with the models of a run.

    Args:
      models: learner and reference, as far as the rule needs them.
      ring: names the device; orders writes to the models after their readers.
      scoring: how they embed.
      refresh_every: steps between copies of the learner's weights.
      metrics: where rows are counted.
      pixel_tables: the work left to do to pixels, by the name of their view.
    """

    def __init__(
        self,
        models: Models,
        ring: Ring,
        *,
        scoring: ScoringConfig,
        refresh_every: int,
        metrics: Metrics,
        pixel_tables: Mapping[str, PixelTable],
    ) -> None:
        self._models = models
        self._ring = ring
        self._scoring = scoring
        self._refresh_every = refresh_every
        self._metrics = metrics
        self._pixel_tables = pixel_tables
        self._has_table: set[str] = set()  # views whose pixel_table has a table on the device
        self._micro_batch_size = scoring.micro_batch_size  # smaller once memory has run out
        self._copy: LearnerCopy | None = None
        self._reference: ReferenceModel | None = None
        self._restored: dict[str, Any] | None = None  # a checkpoint's copy, until ours is made

    @property
    def weights_step(self) -> int | None:
        """The step whose learner weights the copy holds; None without a copy."""
        return None if self._copy is None else self._copy.step

    @property
    def weights_in_use(self) -> object:
        """Names the weights that `embed` reads, for the ring; None without a copy."""
        return None if self._copy is None else self._copy.read_now

    def refresh(self, step: int, *, force: bool = False) -> None:
        """Copies the learner's weights if `step` is one of the promised steps, or if forced.

        The first call makes the copy: the learner may have been moved or wrapped until then.
        """
        if self._models.learner is None:
            return
        if self._copy is None:
            self._copy = self._made_copy(self._models.learner, step)
            self._restored = None  # only now, when the copy holds it
        if force or self._copy.is_due(step):
            with self._ring.writing(self._copy.written_next, self._copy.home):
                self._copy.refresh(step, force=True)

    def prepare(self, columns: Columns) -> None:
        """Makes the reference and the tables that `embed` reads, on the caller's current stream."""
        unmade = [
            name for name in self._pixel_tables if name in columns and name not in self._has_table
        ]
        if unmade:  # batches use the tables too, on the caller's stream
            with self._ring.writing(None):
                for name in unmade:
                    self._pixel_tables[name].table(columns[name].shape[1], self._ring.device)
            self._has_table.update(unmade)
        if self._models.reference is not None and self._reference is None:
            with self._ring.writing(None, two_tower(self._models.reference).device):
                self._reference = ReferenceModel(
                    self._models.reference,
                    device=self._ring.device,
                    learner=self._models.learner,
                    scoring=self._scoring,
                )

    def embed(
        self, columns: Columns, *, with_learner: bool = True
    ) -> tuple[Embeddings | None, Embeddings | None]:
        """Returns the embeddings of B candidates by learner copy and reference; None without one.

        Where memory runs out, it goes on in smaller parts from then on.

        Raises:
          ScoringMemoryError: if there is too little for a single candidate.
        """
        while True:
            try:
                learner = self._embed_learner(columns) if with_learner else None
                return learner, self._embed_reference(columns)
            except torch.cuda.OutOfMemoryError as error:
                if self._micro_batch_size == 1:
                    raise ScoringMemoryError(
                        f"scoring one candidate at a time needs more memory than "
                        f"{self._ring.device} has left: {error} Leave more to scoring: a smaller "
                        f"training batch, a smaller score view, or scoring_device=, another device."
                    ) from error
            # Out of the handler, where the error no longer holds tensors of its frames. Never above
            # the super-batch's own size, or the first halvings would change nothing.
            size = min(self._micro_batch_size, len(columns["key"]))
            self._micro_batch_size = max(1, size // 2)

    def reference_of(self, rows: Columns) -> dict[str, Tensor]:
        """Returns the reference's embeddings in b rows of the columns, and its scale and bias.

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
        """Measures the cost of the forward passes that were counted, where it is not known yet."""
        accounting = self._metrics.accounting
        if not accounting.is_unpriced:
            return
        passes: dict[Model, Pass] = {}
        dtype, trained = self._scoring.autocast_dtype, self._models.trained
        if self._copy is not None:
            passes["learner"] = partial(self._copy.embed, autocast_dtype=dtype)
        elif trained is not None:  # of two sizes, the smaller is trained at the score size
            passes["learner"] = partial(_embed_at_score_size, trained, self._scoring)
        if self._reference is not None:
            passes["reference"] = partial(self._reference.embed, autocast_dtype=dtype)
        else:  # its rows were counted before a resume, and none since
            reference = self._models.reference
            passes["reference"] = partial(_embed_by_reference, reference, self._scoring)
        if trained is not None:
            passes["trained"] = partial(embed_once, trained)
        self._metrics.price(passes)

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the learner copy's weights for a checkpoint, None if there is no copy."""
        return self._restored if self._copy is None else self._copy.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Takes the weights of a checkpoint; None has the copy made anew."""
        self._restored = state
        self._copy = None

    def close(self) -> None:
        """Lets go of the copy and of the models."""
        self._copy = self._reference = self._restored = None
        self._models.release()

    def _made_copy(self, learner: nn.Module, step: int) -> LearnerCopy:
        with self._ring.writing(None, two_tower(learner).device):
            made = LearnerCopy(
                learner,
                refresh_every=self._refresh_every,
                device=self._ring.device,
                step=step,
                has_spare=self._ring.backend is not None,  # written while the other one is read
                scoring=self._scoring,
            )
            if self._restored is not None:
                made.load_state_dict(self._restored)
        return made

    def _embed_learner(self, columns: Columns) -> Embeddings | None:
        if self._copy is None:
            return None
        return self._embed("learner", self._copy, columns, "image", "text")

    def _embed_reference(self, columns: Columns) -> Embeddings | None:
        # There are three cases:
        # 1. A cache: its rows were read with the examples.
        if self._models.cache is not None:
            return self._models.cache.embeddings(
                columns[f"{REFERENCE}/image"], columns[f"{REFERENCE}/text"]
            )
        # 2. The rule needs no reference.
        if self._reference is None:
            return None
        # 3. A model. It has views of its own, or shares the learner's, each tower by itself.
        names = {key.split("/")[0] for key in columns}
        image = "reference_image" if "reference_image" in names else "image"
        text = "reference_text" if "reference_text" in names else "text"
        return self._embed("reference", self._reference, columns, image, text)

    def _embed(
        self,
        role: Literal["learner", "reference"],
        model: LearnerCopy | ReferenceModel,
        columns: Columns,
        image_name: str,
        text_name: str,
    ) -> Embeddings:
        image = self._scored_view(columns, image_name)
        text = tensors_of(columns, text_name, "scoring")
        found = model.embed(
            image,
            text,
            micro_batch_size=self._micro_batch_size,
            autocast_dtype=self._scoring.autocast_dtype,
        )
        shaped = image.shaped if isinstance(image, Pixels) else image
        self._metrics.accounting.count_scored(role, shaped, text)
        return found

    def _scored_view(self, columns: Columns, name: str) -> Input:
        """Returns an image view at the size that is scored.

        Of uint8 pixels it returns `Pixels`, which are finished and scaled slice by slice.
        """
        view = tensors_of(columns, name, "scoring")
        side, pixel_table = self._scoring.image_size, self._pixel_tables.get(name)
        if pixel_table is None or not isinstance(view, Tensor) or view.dtype != torch.uint8:
            return scaled(view, side)
        size = tuple(view.shape[2:]) if side is None else (side, side)
        return Pixels(view, lambda rows: scaled(pixel_table(rows), side), size)


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
