"""`JESTDataset`: what users write instead of their dataset. Wires the rooms; decides nothing.

Iterated in the training process, by the training thread: scoring needs the training device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from jest_stream.config import (
    FilterRatio,
    Limits,
    OnBadExample,
    OnBadShard,
    ScoringConfig,
    SelectionConfig,
    StorageConfig,
    as_integer,
    require_bool,
)
from jest_stream.errors import ClosedError, ConfigError, WrongProcessError
from jest_stream.metrics import Metrics, RunCost
from jest_stream.pipeline import JESTIterator, Pipeline, Plan, rank_and_world_size, structured
from jest_stream.reference_cache import ReferenceCache
from jest_stream.views import Key, ReducedDecoding, TrainViewFrom, Transform

_LOG = logging.getLogger("jest_stream")
_HOW_TO_KNOW = (
    "pass steps_per_epoch to give it one, or repeat=False with a source that knows how many "
    "examples its shards hold (a manifest) and nothing that is skipped"
)


class JESTDataset(IterableDataset[Any]):
    """Yields jointly selected sub-batches, as a dataset for `DataLoader(dataset, batch_size=None)`.

    Each batch is `(images, texts)` (or a dict, see `as_dict`) of exactly `batch_size` examples,
    chosen from a super-batch for what the learner can still learn from them together (JEST, Evans
    et al. 2024, https://arxiv.org/abs/2406.17711). The stream is endless unless `steps_per_epoch`
    or `repeat=False` says otherwise; each `iter()` continues it.

    Args:
      source: tar shards (a path, brace or glob pattern, or a list of them), a `TarSource` or
        `IterableSource`, or any iterable of example dicts or of `(image, text)` pairs.
      storage: how remote shards are reached: cache, read-ahead, time-outs, retries.
      learner: the model being trained, with `encode_image`, `encode_text` and `logit_scale` (as in
        open_clip) or a CLIP or SigLIP of transformers. Never modified; copied at the first `next`.
      reference: what defines what is learnable: a frozen model of the same kind, taken over (put
        into eval mode and moved to the scoring device); the name of one, `"open_clip:NAME/TAG"`,
        `"open_clip:NAME/PATH.safetensors"` or a folder in open_clip's layout; or a
        `ReferenceCache` or its address: then no reference runs.
      transform: makes the tensor that is scored from the decoded image. Deterministic.
      tokenizer: makes the tensor of token ids from the text.
      train_transform: makes the image that is trained on; may draw from the global generators of
        torch, numpy and `random`. Run for the selected only, ahead of time, in worker processes if
        there are any. Default: the scored view.
      train_view_from: what `train_transform` is given: the `"encoded"` image, decoded anew in full;
        or the pixels of the `"score_view"`. `"auto"`: these, where `transform` is a known Compose
        that gives uint8 pixels of the same height and width as the train view, else the former.
      reduced_decoding: whether JPEGs are decoded at a fraction of their size for scoring. `"auto"`:
        where `transform` is a known Compose that begins with a Resize, and the train view is made
        of the encoded image.
      reference_transform: the reference's own view of the image. Default: that of a named model,
        else `transform`'s. With a cache: what it must have been built with.
      reference_tokenizer: the reference's own tokens. Default: likewise, else `tokenizer`'s.
      image_key: member that holds the image; alternatives as in `"jpg;png"`, or a function of the
        decoded example.
      text_key: likewise for the text.
      batch_size: examples per batch on this rank.
      filter_ratio: share of each super-batch that is discarded, in [0, 1); or a dict of such by
        the step from which they hold.
      super_batch_size: candidates per batch on this rank; overrides `filter_ratio`.
      selection: how sub-batches are chosen.
      scoring: how the learner copy and the reference embed candidates: precision, image and patch
        size, dropped tokens, micro-batches.
      score_view_fraction: share of each batch that is handed out as it was scored, at the size of
        `scoring`, to train at both sizes: batches are `((images, texts), (small_images,
        small_texts))`, or have `small_image`, ... too. See `at_score_size`.
      refresh_every: steps between copies of the learner's weights.
      lookahead: super-batches scored ahead. A batch is chosen with weights `lookahead` steps old.
        Default: 1; or 2 with a `train_transform` where scoring runs on CUDA.
      steps_per_epoch: batches per `iter()`, and `len()`. Default: endless.
      repeat: whether the data starts over. If not, each `iter()` is one pass; on several ranks the
        source must then know its counts, so that all end after the same number of batches.
      seed: of the order of examples, the choice and the train view.
      num_workers: processes that read, decode and transform; with a `train_transform`, as many more
        make the train views. 0: the training process does.
      lanes: shards read side by side. Default: up to 64, so that it divides the super-batch.
      device: where batches lie. Default: the learner's device, else the reference's, else the CPU.
      scoring_device: where the copy and the reference run. Default: `device`.
      as_dict: yield a dict with `image`, `text`, `key` and `weight`, which undoes the selection in
        means over examples (see `Selection.weights`).
      with_reference: add `reference` to the dict: a dict with the `image` and `text` embeddings of
        the batch by the reference, `[b, D]` float32 with unit-norm rows, and its `logit_scale` and
        `logit_bias`. For distillation.
      on_bad_example: `"raise"`, or `"skip"` to leave out and count an unreadable example.
      on_bad_shard: `"raise"`, or `"skip"` to leave out and count the rest of a damaged shard.
      max_bad_fraction: share of bad examples, of a thousand or more, above which skipping ends.
      limits: the largest images and texts that are decoded.
      timeout_s: seconds to wait for a worker process.
      training_flops: FLOPs of your training step per example, for `metrics()` and `cost()`: what
        `jest_stream.training_flops` counts of a step, divided by its examples. Default: three
        forward passes of the learner, which is too little where that is a small proxy of what is
        trained.

    Raises:
      ConfigError: for arguments that cannot work, with the fix.
    """

    _iterator_token: object = None  # held by the iterator that may draw from the stream
    _pipeline: Pipeline | None = None  # made at first use: ranks are known by then
    _is_closed = False

    def __init__(
        self,
        source: Any,
        *,
        storage: StorageConfig | None = None,
        learner: nn.Module | None = None,
        reference: nn.Module | ReferenceCache | str | os.PathLike[str] | None = None,
        transform: Transform | None = None,
        tokenizer: Transform | None = None,
        train_transform: Transform | None = None,
        train_view_from: TrainViewFrom = "auto",
        reduced_decoding: ReducedDecoding = "auto",
        reference_transform: Transform | None = None,
        reference_tokenizer: Transform | None = None,
        image_key: Key = "jpg;jpeg;png;webp;gif;image",
        text_key: Key = "txt;text",
        batch_size: int,
        filter_ratio: FilterRatio = 0.8,
        super_batch_size: int | None = None,
        selection: SelectionConfig | None = None,
        scoring: ScoringConfig | None = None,
        score_view_fraction: float = 0.0,
        refresh_every: int = 1,
        lookahead: int | None = None,
        steps_per_epoch: int | None = None,
        repeat: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        lanes: int | None = None,
        device: torch.device | str | None = None,
        scoring_device: torch.device | str | None = None,
        as_dict: bool = False,
        with_reference: bool = False,
        on_bad_example: OnBadExample = "raise",
        on_bad_shard: OnBadShard = "raise",
        max_bad_fraction: float = 0.01,
        limits: Limits | None = None,
        timeout_s: float = 120.0,
        training_flops: float | None = None,
    ) -> None:
        arguments = dict(locals())
        super().__init__()
        self._plan = Plan(arguments)
        self._as_dict = require_bool("as_dict", as_dict)
        self._metrics = Metrics(
            groups=self._plan.selection.quotas or (), training_flops=training_flops
        )

    def __iter__(self) -> JESTIterator:
        """Returns an iterator that continues the stream; an older one stops being usable."""
        worker = get_worker_info()
        if worker is not None:
            raise WrongProcessError(
                f"JESTDataset must be iterated in the training process, because it scores with the "
                f"learner, but it is running in DataLoader worker {worker.id}. Use "
                f"DataLoader(dataset, batch_size=None, num_workers=0), and "
                f"JESTDataset(num_workers={worker.num_workers}) to read in worker processes."
            )
        pipeline = self._open()
        if pipeline.run.epoch_step and not pipeline.run.is_resumed:  # the last epoch was broken off
            pipeline.begin_epoch()
        self._iterator_token = object()
        return JESTIterator(self, self._iterator_token)

    def __len__(self) -> int:
        """Returns `num_batches`.

        Raises:
          TypeError: where that is not known, as for an endless stream.
        """
        num_batches = self._num_batches()
        if num_batches is None:
            raise TypeError(f"this JESTDataset has no length; {_HOW_TO_KNOW}")
        return num_batches

    @property
    def num_batches(self) -> int:
        """Batches per epoch on this rank; the same on every rank.

        With `repeat=False` it is known before if the source knows its counts and nothing is
        skipped. After a resume within an epoch, that epoch gives what is left of it.

        Raises:
          ConfigError: where nobody knows, as for an endless stream.
        """
        num_batches = self._num_batches()
        if num_batches is None:
            raise ConfigError(f"num_batches and num_samples are not known; {_HOW_TO_KNOW}")
        return num_batches

    @property
    def num_samples(self) -> int:
        """Examples per epoch that are handed out, over all ranks; raises as `num_batches` does."""
        return self.num_batches * self._plan.sizes.batch_size * rank_and_world_size()[1]

    def _num_batches(self) -> int | None:
        # Asked for before there are ranks, a length that was given must not settle how many.
        return self._plan.stream.steps_per_epoch or self._open().num_batches()

    def set_epoch(self, epoch: int) -> None:
        """Tells which epoch the next `iter()` is, as trainers do before each one.

        With `repeat=False` it goes to the start of that pass, unless the dataset is there already
        or a checkpoint of that pass was just loaded, which then goes on where it was.

        A stream goes on wherever it is, whatever the epoch, and so does a loaded checkpoint. Only
        where nothing was drawn and nothing loaded does it begin elsewhere: each lane in its pass
        number `epoch`, at step `epoch * steps_per_epoch`. So a trainer that resumes without this
        dataset's state is not given the data of its first epoch again; for the exact place, load
        the state.
        """
        self._open().set_epoch(as_integer("epoch", epoch, 0))

    def refresh(self) -> None:
        """Copies the learner's weights now, whatever `refresh_every` says."""
        self._open().refresh()

    def metrics(self) -> dict[str, float | int]:
        """Returns what happened so far, as a flat dict for any logger.

        The first call that finds a model or a size of views for the first time runs one example
        through the model, to count its FLOPs; nothing of it changes but that its forward hooks
        see that example. FLOPs are NaN before the first batch, and for what cannot be counted.
        """
        self._price()
        return self._metrics.as_dict()

    def cost(self) -> RunCost:
        """Returns what the run paid so far on this rank, and what that means: `print` it.

        FLOPs are counted as in `metrics()`: ask once before `close()`, which lets go of the models.
        """
        self._price()
        return self._metrics.cost()

    def state_dict(self, *, include_learner_copy: bool = False) -> dict[str, Any]:
        """Returns what resumes the stream behind the last batch handed out.

        Plain numbers and strings, loadable with `weights_only=True`; of this rank only, see
        `gather_state_dict` for all. Resuming is exact with `refresh_every=1` or at a refresh; else
        with `include_learner_copy=True`, which adds the copy's weights. A closed dataset still has
        the state in which it was closed, without the copy.
        """
        is_kept = self._is_closed and self._pipeline is not None and not include_learner_copy
        pipeline = self._pipeline if is_kept else self._open()
        assert pipeline is not None
        return pipeline.state_dict(include_learner_copy=include_learner_copy)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state_dict()` was taken. Nothing is read before the next batch.

        Takes the state that this rank saved; or what `gather_state_dict` gave, which any number
        of ranks can load, as long as they read as much per step together as the former ones did.
        Then the super-batches in flight are read and chosen from anew: no example is lost or
        repeated.

        Raises:
          ResumeMismatchError: if it was taken under other settings; names both values.
        """
        self._open().load_state_dict(state)

    def close(self) -> None:
        """Stops workers, closes files and connections, lets go of the models.

        May be called again. A `Source` that was passed is left open: others may read from it. What
        the run cost is logged by the logger `jest_stream`, at level INFO.
        """
        if not self._is_closed and self._pipeline is not None and _LOG.isEnabledFor(logging.INFO):
            _LOG.info("%r has ended.\n%s", self, self.cost())
        self._release()

    def _release(self) -> None:
        self._metrics.stop_clock()
        self._is_closed = True
        if self._pipeline is not None:
            self._pipeline.close()
        self._plan.release()

    def __enter__(self) -> JESTDataset:
        return self

    def __del__(self) -> None:
        if hasattr(self, "_metrics"):  # the constructor may have failed before
            self._release()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        parts = [self._plan.describe()]
        if self._is_closed:
            parts.append("closed")
        elif self._pipeline is not None:
            parts.append(self._pipeline.describe())
        return f"<JESTDataset {' | '.join(parts)}>"

    def __bool__(self) -> bool:
        """Returns True: without it, truth would be asked of a length that may not exist."""
        return True

    def __reduce__(self) -> NoReturn:
        """Raises: a copy would score with a learner that nobody trains."""
        raise WrongProcessError(
            "JESTDataset cannot be copied or sent to another process, because it scores with the "
            "learner that is trained in this one. Use DataLoader(dataset, batch_size=None, "
            "num_workers=0), and JESTDataset(num_workers=...) to read in worker processes."
        )

    def _open(self) -> Pipeline:
        if self._is_closed:
            raise ClosedError("this JESTDataset is closed; make a new one to read on")
        if self._pipeline is None:
            rank, world_size = rank_and_world_size()
            self._pipeline = self._plan.build(self._metrics, rank=rank, world_size=world_size)
        return self._pipeline

    def _price(self) -> None:
        if self._pipeline is not None and not self._is_closed:
            self._pipeline.price()

    def _rest(self) -> None:
        self._metrics.stop_clock()

    def _pause(self) -> None:
        self._rest()
        if self._pipeline is not None:
            self._pipeline.pause()

    def _is_held_by(self, token: object) -> bool:
        return self._iterator_token is token

    def _next(self) -> tuple[Any, bool]:
        """One batch in the user's structure, None at the end of a pass; whether the epoch ended."""
        with self._metrics.timed("yielding"):
            pipeline = self._open()
            try:
                columns = pipeline.next_batch()
            except BaseException:
                pipeline.pause()
                raise
            has_ended = pipeline.run.epoch_step == 0
            batch = None if columns is None else structured(columns, as_dict=self._as_dict)
        self._metrics.hand_over()
        return batch, has_ended
