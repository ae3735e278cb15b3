"""Accounts for a run's FLOPs: rows are counted as they pass, and priced when the user asks.

Counting remembers the number of rows of each shape that a model took: a few integers, no tensors.
The price of a row is measured once for each model and shapes, by one forward pass of a row of ones.
It runs on the model's device, without gradients and with the random state put back. A checkpoint
holds the counts; prices are measured anew.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from jest_stream.metrics.flops import Flops, forward_flops

_LOG = logging.getLogger("jest_stream")

Role = Literal["learner", "reference", "trained", "reusable", "small", "reusable_small"]
"""The taker of the rows: the learner copy, the reference, the user's training step (`small` at the
score size). Rows that the learner copy scored in the shapes they are trained in count a second time
as `reusable`: the paper's loader runs their forward pass once."""
Model = Literal["learner", "reference", "trained"]
"""The model of a measured forward pass: the learner copy, which may be altered to be cheap, the
reference, or the learner itself (`trained`)."""
Rows = Tensor | Mapping[str, Tensor]
"""Rows of a view, as a model takes them: a tensor, or named tensors."""
ForwardPass = Callable[[Rows, Rows], object]
"""One forward pass of a model without gradients: images and texts in."""
Shapes = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and row size of each tensor; a size of -1 for values that are no tensors."""

_PREFIX = "flops/"
_SELECTION = _PREFIX + "selection"
# A backward pass costs two forward passes: one for the gradients of the weights, one for those of
# the inputs.
_TRAINING_FORWARDS = 3
_MODEL_OF: dict[Role, Model] = {
    "learner": "learner",
    "reference": "reference",
    "trained": "trained",
    "reusable": "trained",
    "small": "learner",
    "reusable_small": "learner",
}


class Accounting:
    """Counts rows by shapes and prices them.

    Args:
      training_flops: FLOPs of a training step per example, if the user knows; else it is taken to
        be three forward passes of the learner.
    """

    def __init__(self, *, training_flops: float | None = None) -> None:
        self._training_flops = training_flops
        self._rows: Counter[tuple[Role, Shapes]] = Counter()
        self._selection = 0
        self._scored: Shapes | None = None  # by the learner copy, last
        self._prices: dict[tuple[Model, Shapes], float] = {}  # per row; NaN where it failed

    @property
    def is_training_estimated(self) -> bool:
        """Tells whether a training step is taken to cost three forward passes."""
        return self._training_flops is None

    def count_scored(self, model: Literal["learner", "reference"], image: Rows, text: Rows) -> None:
        """Notes that a model embedded the rows of these views."""
        shapes = shapes_of(image, text)
        self._rows[model, shapes] += _num_rows(image)
        if model == "learner":
            self._scored = shapes

    def count_selection(self, flops: int) -> None:
        """Adds the FLOPs of a choice."""
        self._selection += flops

    def count_trained(
        self, image: Any, text: Any, *, was_scored: bool, is_small: bool = False
    ) -> None:
        """Notes that the rows of these views were handed out.

        Args:
          image: as handed out; a list where the user has no transform.
          text: likewise.
          was_scored: whether the learner copy embedded their score views.
          is_small: whether they are handed out at the score size: the model takes as few tokens
            of them as the learner copy does.
        """
        shapes, num_rows = shapes_of(image, text), _num_rows(image)
        self._rows["small" if is_small else "trained", shapes] += num_rows
        if was_scored and shapes == self._scored:
            self._rows["reusable_small" if is_small else "reusable", shapes] += num_rows

    def unpriced(self) -> set[tuple[Model, Shapes]]:
        """Returns the prices that counted rows need and that were not measured yet."""
        needed: set[tuple[Model, Shapes]] = set()
        # Where the user states the FLOPs of training, its rows need no price, but for one case:
        # with small rows among them, `_spared` compares forward passes.
        has_small = any(role == "small" for role, _ in self._rows)
        for role, shapes in self._rows:
            if role not in ("trained", "small") or self.is_training_estimated or has_small:
                needed.add((_MODEL_OF[role], shapes))
        return needed - self._prices.keys()

    def price(self, passes: Mapping[Model, ForwardPass]) -> None:
        """Measures the prices that are missing, once each; a failure is logged, and stays NaN.

        Does nothing where it would be recorded: within a CUDA graph's capture or a trace.

        Args:
          passes: forward passes without gradients. Rows of a model without one wait for a later
            call.
        """
        if _is_recorded():
            return
        for model, shapes in self.unpriced():
            if model in passes:
                self._prices[model, shapes] = _price(model, passes[model], shapes)

    def flops(self) -> Flops:
        """Returns the FLOPs paid so far; NaN for parts that are not or cannot be priced."""
        paid: dict[Role, float] = dict.fromkeys(get_args(Role), 0)
        for (role, shapes), num_rows in self._rows.items():
            paid[role] += num_rows * self._row_price(role, shapes)
        training = paid["trained"] + paid["small"]
        return Flops(
            training=training,
            spared=self._spared(training),
            learner_scoring=paid["learner"],
            reference_scoring=paid["reference"],
            selection=self._selection,
            reusable=paid["reusable"] + paid["reusable_small"],
        )

    def state_dict(self) -> dict[str, int]:
        """Returns the counts, flat; every name begins with `flops/`."""
        rows = {f"{_PREFIX}{role} {json.dumps(s)}": n for (role, s), n in self._rows.items()}
        return {**rows, _SELECTION: self._selection}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on counting from `state`, in which other counters may be too."""
        self._selection = state.get(_SELECTION, 0)
        self._rows, self._scored = Counter(), None
        # A name looks like `flops/learner [["image", "float32", [3, 224, 224]], ...]`.
        for name, count in state.items():
            role, _, shapes = name.removeprefix(_PREFIX).partition(" ")
            if self.owns(name) and name != _SELECTION:
                parsed = tuple((n, dtype, tuple(size)) for n, dtype, size in json.loads(shapes))
                self._rows[role, parsed] = count  # type: ignore[index]
                if role == "learner":
                    self._scored = parsed

    @staticmethod
    def owns(name: str) -> bool:
        """Returns whether a counter of this name is one of those that `state_dict` gives."""
        return name.startswith(_PREFIX)

    def _measured(self, model: Model, shapes: Shapes) -> float:
        """Returns the FLOPs of a forward pass of one row; NaN if they are not known."""
        return self._prices.get((model, shapes), math.nan)

    def _spared(self, training: float) -> float:
        """Returns the extra cost of `training` if all rows had the size of the train view.

        Forward passes are compared, since the user may have stated `training` as one number: 4 rows
        of 10 FLOPs and 4 small ones of 5 make 60 where whole ones make 80, a third more.
        """
        num_rows, forwards = {"trained": 0, "small": 0}, {"trained": 0.0, "small": 0.0}
        for (role, shapes), count in self._rows.items():
            if role in num_rows:
                num_rows[role] += count
                forwards[role] += count * self._measured(_MODEL_OF[role], shapes)
        if not num_rows["small"]:
            return 0.0
        whole = forwards["trained"] * (1 + num_rows["small"] / num_rows["trained"])
        paid = sum(forwards.values())
        # A model that only looks up embeddings has no FLOPs that count.
        return training * (whole / paid - 1) if paid else math.nan

    def _row_price(self, role: Role, shapes: Shapes) -> float:
        # There are four cases:
        # 1. A trained row whose price the user stated.
        if role in ("trained", "small") and self._training_flops is not None:
            return self._training_flops
        # 2. A row that could be reused. A copy that scored at larger patches or without some tokens
        #    was cheaper than the learner is in the same shapes: its pass is no part of training.
        if role == "reusable":
            scoring, forward = self._measured("learner", shapes), self._measured("trained", shapes)
            return 0 if scoring < forward else scoring
        # 3. Any other trained row costs three forward passes, 4. any other scored row one.
        price = self._measured(_MODEL_OF[role], shapes)
        return price * _TRAINING_FORWARDS if role in ("trained", "small") else price


def shapes_of(image: Any, text: Any) -> Shapes:
    """Returns name, dtype and size of each tensor in one row of the views."""
    found = []
    for name, view in (("image", image), ("text", text)):
        entries = view if isinstance(view, Mapping) else {"": view}
        for entry, value in entries.items():
            is_tensor = isinstance(value, Tensor)
            dtype = str(value.dtype).removeprefix("torch.") if is_tensor else type(value).__name__
            size = tuple(value.shape[1:]) if is_tensor else (-1,)
            found.append((f"{name}/{entry}" if entry else name, dtype, size))
    return tuple(found)


def _num_rows(view: Any) -> int:
    return len(next(iter(view.values()))) if isinstance(view, Mapping) else len(view)


def _price(model: Model, forward: ForwardPass, shapes: Shapes) -> float:
    """Returns the FLOPs of one row; NaN, and a warning, if they cannot be counted."""
    try:
        return forward_flops(forward, _ones(shapes, "image"), _ones(shapes, "text"))
    except Exception as error:  # a model may raise anything, and counting must not end a run
        work, advice = f"{model}'s scoring", ""
        if model == "trained":
            work = "training step"
            advice = " JESTDataset(training_flops=...) states them."
        _LOG.warning(
            "The FLOPs of the %s cannot be counted, so metrics() reports NaN; training is not "
            "affected.%s %s: %s",
            work,
            advice,
            type(error).__name__,
            error,
        )
        return math.nan


def _ones(shapes: Shapes, view: str) -> Rows:
    """Returns a row that stands for the view: only its shape counts, and 1 is a valid token."""
    entries = {}
    for name, dtype, size in shapes:
        if name.split("/")[0] == view:
            if -1 in size:
                raise TypeError(f"the {view} is a {dtype}, not a tensor")
            entries[name.partition("/")[2]] = torch.ones((1, *size), dtype=getattr(torch, dtype))
    return entries[""] if "" in entries else entries


def _is_recorded() -> bool:
    """Returns whether the present work is captured or traced, to run again each time."""
    if torch.compiler.is_compiling():
        return True
    is_ready = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_ready and torch.cuda.is_current_stream_capturing()
