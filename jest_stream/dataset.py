"""Defines `JESTDataset`, which users put in place of their dataset.

Arguments go in, batches come out. The class checks its settings by `config` and passes all work on
to `pipeline`. It runs in the training process and in the training thread, because scoring needs the
learner and its device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from jest_stream.config import (
    DEFAULT_IMAGE_KEY,
    DEFAULT_LIMITS,
    DEFAULT_TEXT_KEY,
    BatchConfig,
    FilterRatio,
    Key,
    Limits,
    OnBadExample,
    OnBadShard,
    ReducedDecoding,
    RunSettings,
    ScoringConfig,
    SelectionConfig,
    StorageConfig,
    StreamConfig,
    TrainViewFrom,
    Transform,
    ViewConfig,
    as_config,
    as_device,
    as_integer,
    resolve_sizes,
)
from jest_stream.errors import ClosedError, ConfigError, WrongProcessError
from jest_stream.metrics import Metrics, RunCost
from jest_stream.pipeline import (
    JESTIterator,
    Pipeline,
    build,
    describe,
    open_inputs,
    rank_and_world_size,
    structured,
)
from jest_stream.reference_cache import ReferenceCache

_LOG = logging.getLogger("jest_stream")
_HOW_TO_KNOW = (
    "pass steps_per_epoch to give it one, or repeat=False with a source that knows how many "
    "examples its shards hold (a manifest) and nothing that is skipped"
)


class JESTDataset(IterableDataset[Any]):
    """Streams jointly selected sub-batches of image-text pairs.

    Each step reads a super-batch of B candidates, scores their pairs by the learner's loss minus
    the reference's, and hands out the b candidates that the learner can learn most from together
    (JEST, Evans et al. 2024, https://arxiv.org/abs/2406.17711):

        dataset = JESTDataset("pairs-*.tar", learner=model, reference="open_clip:ViT-B-32/openai",
                              transform=preprocess_val, tokenizer=tokenizer, batch_size=256)
        for images, texts in dataset:
            ...

    `DataLoader(dataset, batch_size=None)` works too, for trainers that ask for one.

    Here b is `batch_size`, and B is b / (1 - `filter_ratio`), rounded; both count the examples of
    this rank. `images` is `[b, ...]`, the stacked results of `transform` (or `train_transform`),
    and `texts` `[b, ...]` those of `tokenizer`; where these return mappings, mappings of tensors.
    A batch always has exactly b examples. The stream is endless unless `steps_per_epoch` or
    `repeat=False` says otherwise; each `iter()` continues it.

    Args:
      source: tar shards (a path, a brace or glob pattern, or a list of them), a repository of the
        Hub (`"hf://datasets/org/name"`), a dataset of `datasets`, a `TarSource` or another
        `Source`, or any iterable of example dicts or of `(image, text)` pairs.
      storage: how remote shards are read: cache folder, read-ahead, time-outs, retries.

      learner: the model being trained, with `encode_image`, `encode_text` and `logit_scale` as in
        open_clip, or a CLIP or SigLIP of transformers. Never modified; copied at the first `next`.
      reference: the frozen model that tells which pairs can be learned. A module of the same kind,
        which is put into eval mode and moved to the scoring device; a name,
        `"open_clip:NAME/TAG"` or `"open_clip:NAME/PATH.safetensors"`; a folder in open_clip's
        layout; or a `ReferenceCache` or its address, which spare running the model.

      transform: turns a decoded picture into the image tensor that is scored. Deterministic.
      tokenizer: turns a text into the tensor of its token ids. Deterministic.
      train_transform: makes the image tensor that is trained on; may draw from the global
        generators of torch, numpy and `random`. Runs for selected examples only, ahead of time, in
        worker processes if `num_workers` is above 0. Default: the scored image is trained on.
      train_view_from: the input of `train_transform`: `"encoded"`, the picture, decoded anew in
        full, or `"score_view"`, the pixels that were scored. `"auto"`: the latter where `transform`
        is a known Compose that gives uint8 pixels of the train view's height and width.
      reduced_decoding: whether JPEGs are decoded at a fraction of their size for scoring.
        `"auto"`: where `transform` is a known Compose that begins with a Resize, and the train view
        is made of the encoded image.
      reference_transform: the `transform` for the reference. Default: that of a named model, else
        the learner's. With a cache: the one that the cache must have been built with.
      reference_tokenizer: the `tokenizer` for the reference; defaults likewise.
      image_key: the member that holds the image, alternatives as in `"jpg;png"`, or a function of
        the decoded example.
      text_key: likewise for the text.

      batch_size: b, examples per batch on this rank.
      filter_ratio: share of each super-batch that is discarded, in [0, 1). A dict gives the ratio
        from each step on: `{0: 0.5, 1000: 0.8}`.
      super_batch_size: B, candidates per batch on this rank; overrides `filter_ratio`.
      selection: how sub-batches are chosen: method, score, chunks, quotas, ...
      scoring: how candidates are embedded: precision, image and patch size, dropped tokens.
      score_view_fraction: share of each batch that is handed out as it was scored, at the size of
        `scoring`, to train at both sizes. Batches are then `((images, texts), (small_images,
        small_texts))`, or dicts with `small_image`, ... too. See `at_score_size`.
      refresh_every: steps between copies of the learner's weights.
      lookahead: super-batches scored ahead: a batch is chosen with weights `lookahead` steps old.
        Default: 1, or 2 with a `train_transform` where scoring runs on CUDA.

      steps_per_epoch: batches per `iter()`, and `len()`. Default: endless.
      repeat: whether the data starts over. If not, each `iter()` is one pass; on several ranks the
        source must then know its counts, since all ranks end after the same number of batches.
      seed: of the order of examples, the choice and the train view.
      num_workers: processes that read, decode and transform, and as many more for a
        `train_transform`. 0: the training process does.
      lanes: shards read side by side. Default: up to 64, if possible a divisor of the super-batch.
      device: where batches lie. Default: the learner's device, else the reference's, else the CPU.
      scoring_device: where the learner copy and the reference run. Default: `device`.

      as_dict: whether a batch is a dict of `image`, `text`, `key` and `weight`, `[b]` float32,
        which undoes the selection in means over examples (see `Selection.weights`).
      with_reference: adds `reference` to that dict, for distillation: the reference's `image` and
        `text` embeddings of the batch, `[b, D]` float32 with unit-norm rows, its `logit_scale` and
        `logit_bias`.

      on_bad_example: `"raise"`, or `"skip"` to leave out and count an unreadable example.
      on_bad_shard: `"raise"`, or `"skip"` to leave out and count the rest of a damaged shard.
      max_bad_fraction: share of bad examples, among a thousand or more, above which skipping ends.
      limits: the largest images and texts that are decoded.
      timeout_s: seconds to wait for a worker process.
      training_flops: FLOPs of your training step per example, for `metrics()` and `cost()`; see
        `jest_stream.training_flops`, which counts a step. Default: three forward passes of the
        learner, too little where that is a small proxy of the model that is trained.

    Raises:
      ConfigError: for arguments that cannot work, with the fix.
      ShardUnavailableError: for a shard that does not exist.
    """

    _iterator_token: object = None  # held by the iterator that may draw from the stream
    _pipeline: Pipeline | None = None  # made at the first use: ranks are known by then
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
        image_key: Key = DEFAULT_IMAGE_KEY,
        text_key: Key = DEFAULT_TEXT_KEY,
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
        super().__init__()
        selection = as_config(
            "selection",
            selection,
            SelectionConfig,
            "SelectionConfig(method='uniform'), or **preset('uniform')",
        )
        # Each line checks its part, in this order. Files are opened last: a wrong number must not
        # wait for a bucket to be listed.
        self._settings = RunSettings(
            selection=selection,
            sizes=resolve_sizes(selection, batch_size, filter_ratio, super_batch_size),
            stream=StreamConfig(
                refresh_every=refresh_every,
                lookahead=lookahead,
                steps_per_epoch=steps_per_epoch,
                repeat=repeat,
                seed=seed,
                num_workers=num_workers,
                lanes=lanes,
                on_bad_example=on_bad_example,
                on_bad_shard=on_bad_shard,
                max_bad_fraction=max_bad_fraction,
                timeout_s=timeout_s,
                training_flops=training_flops,
            ),
            scoring=as_config(
                "scoring", scoring, ScoringConfig, "ScoringConfig(autocast_dtype=torch.bfloat16)"
            ),
            device=as_device("device", device),
            scoring_device=as_device("scoring_device", scoring_device),
            batch=BatchConfig(
                as_dict=as_dict,
                with_reference=with_reference,
                score_view_fraction=score_view_fraction,
            ),
            views=ViewConfig(
                image_key=image_key,
                text_key=text_key,
                transform=transform,
                tokenizer=tokenizer,
                train_transform=train_transform,
                train_view_from=train_view_from,
                reduced_decoding=reduced_decoding,
                reference_transform=reference_transform,
                reference_tokenizer=reference_tokenizer,
                limits=DEFAULT_LIMITS if limits is None else limits,
            ),
            storage=storage,
        )
        self._inputs = open_inputs(self._settings, source, learner=learner, reference=reference)
        self._metrics = Metrics(groups=selection.quotas or (), training_flops=training_flops)

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
        # A loop that was broken off has given up the rest of its epoch: the next one begins. A
        # checkpoint that was just loaded finishes its epoch first.
        if pipeline.run.epoch_step and not pipeline.run.is_resumed:
            pipeline.begin_epoch()
        self._iterator_token = object()
        return JESTIterator(self, self._iterator_token)

    def __len__(self) -> int:
        """Returns `num_batches`.

        Raises:
          TypeError: if that is not known, as for an endless stream.
        """
        num_batches = self._num_batches()
        if num_batches is None:  # TypeError is the answer that list() and DataLoader understand
            raise TypeError(f"this JESTDataset has no length; {_HOW_TO_KNOW}")
        return num_batches

    @property
    def num_batches(self) -> int:
        """Batches per epoch on this rank; the same on every rank.

        With `repeat=False` it is known beforehand if the source knows its counts and nothing is
        skipped. After a resume within an epoch, that epoch gives the rest of its batches.

        Raises:
          ConfigError: if the number is not known, as for an endless stream.
        """
        num_batches = self._num_batches()
        if num_batches is None:
            raise ConfigError(f"num_batches and num_samples are not known; {_HOW_TO_KNOW}")
        return num_batches

    @property
    def num_samples(self) -> int:
        """Examples handed out per epoch by all ranks together; raises as `num_batches` does."""
        return self.num_batches * self._settings.sizes.batch_size * rank_and_world_size()[1]

    def _num_batches(self) -> int | None:
        # Trainers ask for the length early. Where it was given, the pipeline must not be built for
        # it: that would fix the number of ranks before torch.distributed has started.
        return self._settings.stream.steps_per_epoch or self._open().num_batches()

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next `iter()`, as trainers do before each one.

        There are three cases:

        1. With `repeat=False` the dataset goes to the start of that pass, unless it is there
           already, or a checkpoint of that pass was just loaded: then it goes on where it is.
        2. A stream, or a loaded checkpoint of one, goes on where it is in any epoch.
        3. A stream of which nothing was drawn or loaded begins each lane in its pass number
           `epoch`, at step `epoch * steps_per_epoch`. So a trainer that resumes without this
           dataset's state does not get the data of its first epoch again. For the exact place,
           load the state.
        """
        self._open().set_epoch(as_integer("epoch", epoch, 0))

    def refresh(self) -> None:
        """Copies the learner's weights now, beside the copies of `refresh_every`."""
        self._open().refresh()

    def metrics(self) -> dict[str, float | int]:
        """Returns counters, last values, times and FLOPs so far, as a flat dict for any logger.

        To count FLOPs, it runs one example through each model once, and again for each new size of
        its views; the model's forward hooks see that example, and the model does not change. FLOPs
        are NaN before the first batch, and for models that cannot be counted.
        """
        self._price()
        return self._metrics.as_dict()

    def cost(self) -> RunCost:
        """Returns the price of the run so far on this rank, with its meaning: `print` it.

        FLOPs are counted as in `metrics()`: ask once before `close()`, which lets go of the models.
        """
        self._price()
        return self._metrics.cost()

    def state_dict(self, *, include_learner_copy: bool = False) -> dict[str, Any]:
        """Returns the state that resumes the stream after the last batch handed out.

        Plain numbers and strings, loadable with `weights_only=True`; of this rank only, see
        `gather_state_dict` for all. Resuming is exact with `refresh_every=1` or at a refresh; else
        with `include_learner_copy=True`, which adds the copy's weights. A closed dataset still
        returns the state in which it was closed, without the copy.
        """
        pipeline = self._pipeline
        # A closed pipeline still knows its place, but no weights; `_open` raises for those.
        if pipeline is None or not self._is_closed or include_learner_copy:
            pipeline = self._open()
        return pipeline.state_dict(include_learner_copy=include_learner_copy)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the place where `state_dict()` was taken; reads nothing before the next batch.

        Takes the state that this rank saved, or the merged one of `gather_state_dict`, which any
        number of ranks can load, as long as they read as much per step together as the former ones
        did. Then the super-batches in flight are read and chosen from anew: no example is lost or
        repeated.

        Raises:
          ResumeMismatchError: if it was taken under other settings; names both values.
        """
        self._open().load_state_dict(state)

    def close(self) -> None:
        """Stops workers, closes files and connections, lets go of the models.

        May be called again. A `Source` that was passed is left open: others may read from it. The
        logger `jest_stream` logs the cost of the run, at level INFO.
        """
        if not self._is_closed and self._pipeline is not None and _LOG.isEnabledFor(logging.INFO):
            _LOG.info("%r has ended.\n%s", self, self.cost())
        self._release()

    def _release(self) -> None:
        self._metrics.stop_clock()
        self._is_closed = True
        if self._pipeline is not None:
            self._pipeline.close()
        self._inputs.close()

    def __enter__(self) -> JESTDataset:
        return self

    def __del__(self) -> None:
        if hasattr(self, "_metrics"):  # the constructor may have failed before
            self._release()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        parts = [describe(self._settings, self._inputs)]
        if self._is_closed:
            parts.append("closed")
        elif self._pipeline is not None:
            parts.append(self._pipeline.describe())
        return f"<JESTDataset {' | '.join(parts)}>"

    def __bool__(self) -> bool:
        """Returns True; Python would else ask `__len__`, which an endless stream refuses."""
        return True

    def __reduce__(self) -> NoReturn:
        """Refuses to pickle or copy: the copy would score with a learner that is not trained."""
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
            self._pipeline = build(
                self._settings, self._inputs, self._metrics, rank=rank, world_size=world_size
            )
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
        """Returns a batch, or None at the end of a pass, and whether the epoch has ended."""
        with self._metrics.timed("yielding"):
            pipeline = self._open()
            try:
                columns = pipeline.next_batch()
            except BaseException:
                pipeline.pause()  # the loop may never come back: leave no process, no open file
                raise
            has_ended = pipeline.run.epoch_step == 0  # set back with the last batch of an epoch
            as_dict = self._settings.batch.as_dict
            batch = None if columns is None else structured(columns, as_dict=as_dict)
        self._metrics.hand_over()
        return batch, has_ended
