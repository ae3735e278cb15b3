"""`JESTDataset`: what users write instead of their dataset. Wires the rooms; decides nothing.

Iterated in the training process, by the training thread: scoring needs the training device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info

from jest_stream.config import (
    OnBadExample,
    SelectionConfig,
    StreamConfig,
    Term,
    require_rule,
)
from jest_stream.pipeline import Layout, Pipeline
from jest_stream.reporting.metrics import Metrics
from jest_stream.selector import Models, Selector
from jest_stream.sizes import FilterRatio, resolve_sizes
from jest_stream.sources import open_source
from jest_stream.sources.lanes import num_lanes
from jest_stream.views import Key, ScoreView, TrainView, Transform, view_of


class JESTDataset(IterableDataset[Any]):
    """Yields jointly selected sub-batches, as a dataset for `DataLoader(dataset, batch_size=None)`.

    Each batch is `(images, texts)` (or a dict, see `as_dict`) of exactly `batch_size` examples,
    chosen from a super-batch for what the learner can still learn from them together (JEST, Evans
    et al. 2024, https://arxiv.org/abs/2406.17711). The stream is endless unless `steps_per_epoch`
    or `repeat=False` says otherwise; each `iter()` continues it.

    Args:
      source: tar shards (a path, brace or glob pattern, or a list of them), a `TarSource` or
        `IterableSource`, or any iterable of example dicts or of `(image, text)` pairs.
      learner: the model being trained, with `encode_image`, `encode_text` and `logit_scale` (as in
        open_clip) or a CLIP or SigLIP of transformers. Never modified; copied at the first `next`.
      reference: a frozen model of the same kind that defines what is learnable. Taken over: put
        into eval mode and moved to the scoring device.
      transform: makes the tensor that is scored from the decoded image. Deterministic.
      tokenizer: makes the tensor of token ids from the text.
      train_transform: makes the image that is trained on; may be random. Run for the selected
        only. Default: the view that was scored.
      reference_transform: the reference's own view of the image. Default: `transform`'s.
      reference_tokenizer: the reference's own tokens. Default: `tokenizer`'s.
      image_key: member that holds the image; alternatives as in `"jpg;png"`, or a function of the
        decoded example.
      text_key: likewise for the text.
      batch_size: examples per batch on this rank.
      filter_ratio: share of each super-batch that is discarded, in [0, 1); or a dict of such by
        the step from which they hold.
      super_batch_size: candidates per batch on this rank; overrides `filter_ratio`.
      selection: how sub-batches are chosen.
      refresh_every: steps between copies of the learner's weights.
      lookahead: super-batches scored ahead. A batch is chosen with weights `lookahead` steps old.
      steps_per_epoch: batches per `iter()`, and `len()`. Default: endless.
      repeat: whether the data starts over. If not, each `iter()` is one pass.
      seed: of the order of examples, the choice and the train view.
      num_workers: processes that read, decode and transform. 0: the training process does.
      lanes: shards read side by side. Default: up to 64, so that it divides the super-batch.
      device: where batches lie. Default: the learner's device, else the reference's, else the CPU.
      scoring_device: where the copy and the reference run. Default: `device`.
      as_dict: yield a dict with `image`, `text`, `key` and `weight`, which undoes the selection in
        means over examples (see `Selection.weights`).
      on_bad_example: `"raise"`, or `"skip"` to leave out and count an unreadable example.
      timeout_s: seconds to wait for a worker process.

    Raises:
      ConfigError: for arguments that cannot work, with the fix.
    """

    _iterator_token: object = None  # held by the iterator that may draw from the stream
    _is_closed = False

    def __init__(
        self,
        source: Any,
        *,
        learner: nn.Module | None = None,
        reference: nn.Module | None = None,
        transform: Transform | None = None,
        tokenizer: Transform | None = None,
        train_transform: Transform | None = None,
        reference_transform: Transform | None = None,
        reference_tokenizer: Transform | None = None,
        image_key: Key = "jpg;jpeg;png;webp;gif;image",
        text_key: Key = "txt;text",
        batch_size: int,
        filter_ratio: FilterRatio = 0.8,
        super_batch_size: int | None = None,
        selection: SelectionConfig | None = None,
        refresh_every: int = 1,
        lookahead: int = 1,
        steps_per_epoch: int | None = None,
        repeat: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        lanes: int | None = None,
        device: torch.device | str | None = None,
        scoring_device: torch.device | str | None = None,
        as_dict: bool = False,
        on_bad_example: OnBadExample = "raise",
        timeout_s: float = 120.0,
    ) -> None:
        super().__init__()
        self._selection = SelectionConfig() if selection is None else require_rule(selection)
        self._sizes = resolve_sizes(self._selection, batch_size, filter_ratio, super_batch_size)
        self._config = StreamConfig(
            refresh_every=refresh_every,
            lookahead=lookahead,
            steps_per_epoch=steps_per_epoch,
            repeat=repeat,
            seed=seed,
            num_workers=num_workers,
            lanes=lanes,
            on_bad_example=on_bad_example,
            timeout_s=timeout_s,
        )
        self._source = open_source(source)
        self._score_view = ScoreView(
            keys=(image_key, text_key),
            learner=(transform, tokenizer),
            reference=(reference_transform, reference_tokenizer),
            keep_image=train_transform is not None,
            terms=[term for term in self._selection.terms if isinstance(term, Term)],
            group_by=self._selection.group_by,
        )
        self._train_transform = train_transform
        self._models = Models(self._selection, learner, reference)
        self._devices = (device, scoring_device)
        self._as_dict = as_dict
        self._metrics = Metrics(groups=self._selection.quotas or ())
        self._pipeline: Pipeline | None = None  # made at first use: ranks are known by then

    def __iter__(self) -> JESTIterator:
        """Returns an iterator that continues the stream; an older one stops being usable."""
        worker = get_worker_info()
        if worker is not None:
            raise RuntimeError(
                f"JESTDataset must be iterated in the training process, because it scores with the "
                f"learner, but it is running in DataLoader worker {worker.id}. Use "
                f"DataLoader(dataset, batch_size=None, num_workers=0), and "
                f"JESTDataset(num_workers={worker.num_workers}) to read in worker processes."
            )
        pipeline = self._open()
        if pipeline.epoch_step and not pipeline.is_resumed:  # the last epoch was broken off
            pipeline.begin_epoch()
        self._iterator_token = object()
        return JESTIterator(self, self._iterator_token)

    def __len__(self) -> int:
        """Returns `steps_per_epoch`.

        Raises:
          TypeError: for an endless stream, which has no length.
        """
        if self._config.steps_per_epoch is None:
            raise TypeError("this JESTDataset has no length; pass steps_per_epoch to give it one")
        return self._config.steps_per_epoch

    def refresh(self) -> None:
        """Copies the learner's weights now, whatever `refresh_every` says."""
        self._open().refresh()

    def metrics(self) -> dict[str, float | int]:
        """Returns what happened so far, as a flat dict for any logger."""
        return self._metrics.as_dict()

    def state_dict(self, *, include_learner_copy: bool = False) -> dict[str, Any]:
        """Returns what resumes the stream behind the last batch handed out.

        Plain numbers, strings and small tensors, loadable with `weights_only=True`; of this rank
        only. Resuming is exact with `refresh_every=1` or at a refresh; else with
        `include_learner_copy=True`, which adds the copy's weights.
        """
        return self._open().state_dict(include_learner_copy=include_learner_copy)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state_dict()` was taken. Nothing is read before the next batch.

        Raises:
          ResumeMismatchError: if it was taken under other settings; names both values.
        """
        self._open().load_state_dict(state)

    def close(self) -> None:
        """Stops workers, closes files and lets go of the models. May be called again."""
        self._is_closed = True
        if self._pipeline is not None:
            self._pipeline.close()

    def __enter__(self) -> JESTDataset:
        return self

    def __del__(self) -> None:
        if hasattr(self, "_pipeline"):  # the constructor may have failed before
            self.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        rule: str = self._selection.method
        if rule != "uniform":
            score = self._selection.score
            name = score if isinstance(score, str) else getattr(score, "__name__", "own score")
            rule = f"{rule} {name}, {self._models.loss} loss"
        parts = [rule, str(self._sizes)]
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
        raise RuntimeError(
            "JESTDataset cannot be copied or sent to another process, because it scores with the "
            "learner that is trained in this one. Use DataLoader(dataset, batch_size=None, "
            "num_workers=0), and JESTDataset(num_workers=...) to read in worker processes."
        )

    def _open(self) -> Pipeline:
        if self._is_closed:
            raise RuntimeError("this JESTDataset is closed; make a new one to read on")
        if self._pipeline is None:
            self._pipeline = self._build()
        return self._pipeline

    def _build(self) -> Pipeline:
        rank, world_size = _rank_and_world_size()
        config = self._config
        lanes = num_lanes(
            self._source.num_shards, self._sizes.stream_size * world_size, world_size, config.lanes
        )
        selector = Selector(
            self._selection,
            self._models,
            refresh_every=config.refresh_every,
            metrics=self._metrics,
        )
        train_view = None
        if self._train_transform is not None:
            train_view = TrainView(transform=self._train_transform, seed=config.seed, rank=rank)
        return Pipeline(
            config,
            self._sizes,
            source=self._source,
            layout=Layout(num_lanes=lanes, rank=rank, world_size=world_size),
            score_view=self._score_view,
            train_view=train_view,
            selector=selector,
            metrics=self._metrics,
            devices=self._resolve_devices,
        )

    def _resolve_devices(self) -> tuple[torch.device, torch.device]:
        """Returns where batches go and where scoring runs, by the models as they are now."""
        device, scoring_device = self._devices
        if device is None and self._models.home is not None:
            parameter = next(self._models.home.parameters(), None)
            device = None if parameter is None else parameter.device
        device = torch.device(device or "cpu")
        return device, torch.device(scoring_device or device)

    def _pause(self) -> None:
        if self._pipeline is not None:
            self._pipeline.pause()

    def _next(self) -> Any:
        """One batch in the user's structure; None at the end of a pass."""
        columns = self._open().next_batch()
        if columns is None:
            return None
        image, text = view_of(columns, "image"), view_of(columns, "text")
        if self._as_dict:
            weight = columns["weight"]
            return {"image": image, "text": text, "key": columns["key"], "weight": weight}
        return image, text


class JESTIterator(Iterator[Any]):
    """Draws from the stream of a `JESTDataset`; ends after `steps_per_epoch` batches, if given.

    Dropping it before its end, as `break` does, stops worker processes and closes files; the next
    `iter(dataset)` goes on where it stopped.
    """

    def __init__(self, dataset: JESTDataset, token: object) -> None:
        self._dataset = dataset
        self._token = token
        self._has_ended = False

    def __next__(self) -> Any:
        if self._dataset._iterator_token is not self._token:
            raise RuntimeError(
                "this iterator is closed, because a newer iter(dataset) has taken over the "
                "stream. Use the newest iterator, or one JESTDataset for each loop."
            )
        if self._has_ended:
            raise StopIteration
        try:
            batch = self._dataset._next()
        except StopIteration as error:  # would end the training loop in silence
            raise RuntimeError("a transform, a score or a model raised StopIteration") from error
        self._has_ended = self._dataset._open().epoch_step == 0
        if batch is None:
            raise StopIteration
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns `JESTDataset.state_dict()`."""
        return self._dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state_dict()` was taken; ends where that epoch would have ended."""
        self._dataset.load_state_dict(state)
        self._has_ended = False

    def close(self) -> None:
        """Stops worker processes and closes files, unless a newer iterator uses them."""
        if self._dataset._iterator_token is self._token:
            self._dataset._pause()

    def __del__(self) -> None:
        if not self._has_ended:  # a complete epoch leaves the workers to the next one
            self.close()


def _rank_and_world_size() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
