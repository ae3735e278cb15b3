"""Checks all that users pass to a selection, and brings embeddings to float32, once.

Shapes, sizes and devices are checked everywhere. Values are checked at once on a CPU; on a GPU
that would make the host wait, so a flag on the device tells of NaN and infinity instead.

B: candidates, D: dimension.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from jest_stream.config import ScoreFunction, as_integer
from jest_stream.errors import ConfigError, NonFiniteError
from jest_stream.selection.scores import WeightedScore, needs, resolve_score
from jest_stream.types import Embeddings

_LOSSES = ("sigmoid", "softmax")
# bfloat16 keeps 8 bits: a row normalised in it is off by up to 0.4 %.
_NORM_TOLERANCE = 0.01


@dataclass(frozen=True)
class Candidates:
    """Embeddings that selection can rely on."""

    learner: Embeddings | None
    """float32; None where the score does not need it."""
    reference: Embeddings | None
    """float32; None where the score does not need it."""
    score: ScoreFunction
    """The function to maximise."""
    loss: str
    """Family of the pair losses: "sigmoid" or "softmax"."""
    num_examples: int
    """B."""
    device: torch.device
    """The device of all of them."""
    is_finite: Tensor
    """`[]` bool: no NaN and no infinity. True on a CPU, where either raises."""


def check_candidates(
    learner: Embeddings | None,
    reference: Embeddings | None,
    *,
    score: str | ScoreFunction,
    loss: str,
) -> Candidates:
    """Returns the embeddings that the score needs, in float32.

    Raises:
      ConfigError: if they are missing, do not fit together, or the loss has no such score.
      NonFiniteError: on a CPU, if they hold NaN or infinity.
    """
    if loss not in _LOSSES:
        raise ConfigError(f"loss must be 'sigmoid' or 'softmax', got {loss!r}")
    function = resolve_score(score)
    if loss == "softmax" and not isinstance(function, WeightedScore):
        raise ConfigError(
            "score is a function of pair losses, but loss='softmax' has none: its loss belongs to "
            "an example and its whole batch. Use loss='sigmoid', or WeightedScore(learner_weight, "
            "reference_weight)."
        )
    needed = _needed(learner, reference, score)
    sizes = {name: _check_shapes(model, name) for name, model in needed.items()}
    devices = {name: model.image.device for name, model in needed.items()}
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"learner and reference must embed the same examples in the same order, got "
            f"{sizes['learner']} and {sizes['reference']} rows."
        )
    if len(set(devices.values())) > 1:
        raise ConfigError(
            f"learner and reference embeddings must be on one device, got {devices['learner']} "
            f"and {devices['reference']}. Move one of them with .to()."
        )
    device = next(iter(devices.values()))
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    prepared = {}  # a loop, no comprehension: each frame counts in the stacklevel of the warning
    for name, model in needed.items():
        prepared[name] = _prepare(model, name, is_finite)
    return Candidates(
        learner=prepared.get("learner"),
        reference=prepared.get("reference"),
        score=function,
        loss=loss,
        num_examples=next(iter(sizes.values())),
        device=device,
        is_finite=is_finite,
    )


def check_batch_size(batch_size: int, num_examples: int) -> int:
    """Returns the batch size as Python's integer.

    Raises:
      ConfigError: unless 1 <= batch_size <= num_examples.
    """
    batch_size = as_integer("batch_size", batch_size, 1)
    if batch_size > num_examples:
        raise ConfigError(
            f"batch_size={batch_size} is above the number of candidates, {num_examples}: draws are "
            f"without replacement. Pass a larger super-batch or a smaller batch_size."
        )
    return batch_size


def check_terms(terms: Tensor, candidates: Candidates) -> Tensor:
    """Returns the terms in float32.

    Raises:
      ConfigError: unless they are one number for each candidate, on their device.
      NonFiniteError: on a CPU, if they hold NaN or infinity.
    """
    if terms.shape != (candidates.num_examples,):
        raise ConfigError(
            f"terms must hold one number for each of the {candidates.num_examples} candidates, got "
            f"shape {list(terms.shape)}."
        )
    if terms.device != candidates.device:
        raise ConfigError(
            f"terms are on {terms.device}, the embeddings on {candidates.device}. Move them with "
            f".to()."
        )
    if terms.device.type == "cpu" and not terms.isfinite().all():
        first = int(terms.isfinite().logical_not().nonzero()[0])
        raise NonFiniteError(
            f"terms hold NaN or infinity, the first of them at {first}: a choice by them would "
            f"mean nothing. To exclude examples, leave them out of the candidates."
        )
    return terms.detach().float()


def _needed(
    learner: Embeddings | None, reference: Embeddings | None, score: str | ScoreFunction
) -> dict[str, Embeddings]:
    """Returns the embeddings that the score needs, by name."""
    given = {"learner": learner, "reference": reference}
    found = {}
    for (name, model), is_needed in zip(given.items(), needs(score), strict=True):
        if not is_needed:
            continue
        if model is None:
            other = "easy_reference" if name == "learner" else "hard_learner"
            called = repr(score) if isinstance(score, str) else "a score function"
            raise ConfigError(
                f"{called} needs {name} embeddings, got {name}=None. Pass them, or "
                f"score={other!r}, which does without."
            )
        found[name] = model
    return found


def _check_shapes(model: Embeddings, name: str) -> int:
    """Returns the number of rows; both towers must have the same shape, device and a float type."""
    image, text = model.image, model.text
    if image.dim() != 2 or image.shape != text.shape or 0 in image.shape:
        raise ConfigError(
            f"{name} embeddings must be two [B, D] tensors of one shape, got image "
            f"{list(image.shape)} and text {list(text.shape)}."
        )
    if not (image.is_floating_point() and text.is_floating_point()):
        raise ConfigError(
            f"{name} embeddings must be floating point, got image {image.dtype} and text "
            f"{text.dtype}."
        )
    if image.device != text.device:
        raise ConfigError(
            f"{name} embeddings must be on one device, got image on {image.device} and text on "
            f"{text.device}. Move one of them with .to()."
        )
    return len(image)


def _prepare(model: Embeddings, name: str, is_finite: Tensor) -> Embeddings:
    """Returns the embeddings in float32; `is_finite` is updated in place."""
    scale = _number(model.logit_scale, f"{name} logit_scale", model.image.device, is_finite)
    bias = _number(model.logit_bias, f"{name} logit_bias", model.image.device, is_finite)
    towers = {"image": model.image.detach().float(), "text": model.text.detach().float()}
    for tower, rows in towers.items():
        norms = torch.linalg.vector_norm(rows, dim=1)
        is_finite &= norms.isfinite().all()
        if norms.device.type == "cpu":
            _check_norms(norms, f"{name} {tower}")
    return Embeddings(
        image=towers["image"], text=towers["text"], logit_scale=scale, logit_bias=bias
    )


def _number(
    value: Tensor | float, name: str, device: torch.device, is_finite: Tensor
) -> Tensor | float:
    """Returns a finite float or, where reading it would make the host wait, a 0-d tensor."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ConfigError(f"{name} must be one number, got shape {list(value.shape)}.")
        if value.device.type != "cpu":
            if value.device != device:
                raise ConfigError(
                    f"{name} is on {value.device}, the embeddings on {device}. Move it with .to()."
                )
            on_device = value.detach().float().reshape(())
            is_finite &= on_device.isfinite()
            return on_device
    number = float(value)
    if not math.isfinite(number):
        raise NonFiniteError(
            f"{name} is {number}, so every score would be too. The model has diverged, or a "
            f"logarithm was exponentiated twice."
        )
    return number


def _check_norms(norms: Tensor, name: str) -> None:
    """Raises `NonFiniteError` for rows that are not finite, warns of rows without unit norm."""
    num_bad = int((~norms.isfinite()).sum())
    if num_bad:
        first = int(norms.isfinite().logical_not().nonzero()[0])
        raise NonFiniteError(
            f"{name} embeddings hold NaN or infinity in {num_bad} of {len(norms)} rows, the first "
            f"of them row {first}: a choice among them would mean nothing. Look for a model that "
            f"has diverged, or for overflow in half precision."
        )
    worst = float(norms[(norms - 1).abs().argmax()])
    if abs(worst - 1) > _NORM_TOLERANCE:
        # One digit only: Python warns once per text and place, hence once in a run though the worst
        # norm varies. The place is the caller's of select_jointly, 7 frames up.
        warnings.warn(
            f"{name} embeddings are not unit norm: the worst row has norm {_rounded(worst)}. "
            f"Logits are meant to be logit_scale times a cosine, so such rows are over- or "
            f"underrated. Normalise them: torch.nn.functional.normalize(embeddings, dim=-1).",
            stacklevel=7,
        )


def _rounded(norm: float) -> str:
    """Returns the norm to one digit, below 2 its distance from 1 to one digit: 0.9, 1.03, 3, 20."""
    return f"{1 + float(f'{norm - 1:.1g}') if norm < 2 else float(f'{norm:.1g}'):g}"
