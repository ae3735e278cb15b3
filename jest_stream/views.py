"""What is made of an example: the score view of every candidate, the train view of the chosen.

`ScoreView` turns one example into a row, `collate` stacks rows into columns; both run where the
examples are read, in worker processes if there are any. `TrainView` makes the random view of the
few that were chosen, from the encoded bytes, in the training process.

A row or column is a flat dict. `image` and `text` may each be one tensor or a mapping of tensors
(as processors of transformers return): a mapping's entries are named `image/pixel_values`, ….
What selection wants to know of an example's metadata travels along, as `term` and `group`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jest_stream.config import Metadata, Term
from jest_stream.errors import BadExampleError, ConfigError
from jest_stream.randomness import isolated_rng
from jest_stream.sources.decode import DEFAULT_LIMITS, Decoded, Limits
from jest_stream.types import Example

Row = dict[str, Any]
Columns = dict[str, Any]
"""Each value holds one entry per example: a tensor `[n, …]`, or a list."""
View = Tensor | dict[str, Tensor] | list[Any]
Transform = Callable[[Any], Any]
Key = Metadata
"""Alternatives such as `"jpg;png"`, the first present member counts; or a function of the example,
which sees decoded members."""


@dataclass(frozen=True, kw_only=True)
class ScoreView:
    """Makes the deterministic view that candidates are scored on, one row per example."""

    keys: tuple[Key, Key]
    """Where an example's image and text are."""
    learner: tuple[Transform | None, Transform | None]
    """Transform and tokenizer. None: the values are tensors already."""
    reference: tuple[Transform | None, Transform | None]
    """The reference's own. None: it sees what the learner sees."""
    keep_image: bool
    """Whether the undecoded image travels along, for a train view made later."""
    terms: Sequence[Term] = ()
    """Numbers of the example's own that count in its score; their weighted sum travels along."""
    group_by: Metadata | tuple[str, ...] | None = None
    """What tells the example's group. None: no group travels along."""
    limits: Limits = DEFAULT_LIMITS
    """The largest members that are decoded."""

    def __call__(self, example: Example) -> Row:
        """Returns the row of one example.

        Raises:
          BadExampleError: for a missing or unreadable member, or metadata that are.
          ConfigError: for a value that no transform was given for, or a term that is no number.
        """
        decoded = Decoded(example, self.limits)
        image = _as_rgb(_find(decoded, self.keys[0], "image_key", "missing_image"), self.limits)
        text = _find(decoded, self.keys[1], "text_key", "missing_text")
        row: Row = {"key": example["__key__"], "shard": example.get("__shard__", "")}
        _add(row, "image", image if self.learner[0] is None else self.learner[0](image))
        _add(row, "text", text if self.learner[1] is None else self.learner[1](text))
        if self.reference[0] is not None:
            _add(row, "reference_image", self.reference[0](image))
        if self.reference[1] is not None:
            _add(row, "reference_text", self.reference[1](text))
        if self.keep_image:
            row["raw_image"] = _raw(example, self.keys[0], image)
        if self.terms:
            total = sum(term.weight * _number(decoded, term) for term in self.terms)
            row["term"] = torch.tensor(total, dtype=torch.float32)
        if self.group_by is not None:
            row["group"] = _group(decoded, self.group_by)
        return row


@dataclass(frozen=True, kw_only=True)
class TrainView:
    """Makes the random view that is trained on, for the chosen examples only."""

    transform: Transform
    seed: int
    rank: int
    limits: Limits = DEFAULT_LIMITS
    """The largest images that are decoded."""

    def __call__(self, raw_images: list[Any], *, step: int) -> View:
        """Returns the stacked views; the same ones for the same `seed` and `step`."""
        rows = []
        with isolated_rng("train_view", self.seed, self.rank, step):
            for name, value in raw_images:
                row: Row = {"key": f"of step {step}"}
                image = _as_rgb(Decoded({name: value}, self.limits)[name], self.limits)
                _add(row, "image", self.transform(image), argument="train_transform")
                rows.append(row)
        return view_of(collate(rows), "image")


def collate(rows: list[Row]) -> Columns:
    """Returns the rows as columns: one tensor per field, so that a process hands over few.

    Raises:
      ConfigError: for tensors of different shapes.
    """
    require_same_fields([{**row, "key": [row["key"]]} for row in rows], num_dims=0)
    return {
        name: torch.stack([row[name] for row in rows])
        if isinstance(rows[0][name], Tensor)
        else [row[name] for row in rows]
        for name in rows[0]
    }


def require_same_fields(parts: Sequence[Columns], *, num_dims: int = 1) -> None:
    """Raises `ConfigError` unless all parts can be stacked: same names, shapes and dtypes.

    Args:
      parts: rows, or columns of several; `key` is a list in both.
      num_dims: leading dimensions in which they may differ.
    """
    first = parts[0] if parts else {}
    for part in parts[1:]:
        keys = f"{first['key'][0]!r} and {part['key'][0]!r}"
        if part.keys() != first.keys():
            differing = sorted(part.keys() ^ first.keys())
            raise ConfigError(
                f"the views of {keys} do not have the same entries: {differing} are in one of them "
                f"only. Let transform and tokenizer return the same names for every example."
            )
        for name, value in first.items():
            is_stacked = isinstance(value, Tensor) or isinstance(part[name], Tensor)
            if is_stacked and _kind(part[name], num_dims) != _kind(value, num_dims):
                raise ConfigError(
                    f"{name} must have one shape and dtype for all examples, to be stacked; "
                    f"{keys} have {_kind(value, num_dims)} and {_kind(part[name], num_dims)}. Let "
                    f"the transform resize, crop and convert to RGB, and the tokenizer pad to a "
                    f"fixed length."
                )


def columns_of(columns: Columns, names: Sequence[str]) -> Columns:
    """Returns the columns of these names, views that are mappings included."""
    return {key: column for key, column in columns.items() if key.split("/")[0] in names}


def view_of(columns: Columns, name: str) -> View:
    """Returns the column `name`, or the mapping made of the columns `name/…`."""
    if name in columns:
        column: View = columns[name]
        return column
    prefix = name + "/"
    return {key[len(prefix) :]: columns[key] for key in columns if key.startswith(prefix)}


def put_view(columns: Columns, name: str, view: View) -> None:
    """Replaces the view `name` of the columns; the inverse of `view_of`."""
    for key in [key for key in columns if key == name or key.startswith(name + "/")]:
        del columns[key]
    if isinstance(view, dict):
        columns.update({f"{name}/{key}": value for key, value in view.items()})
    else:
        columns[name] = view


def _kind(value: Any, num_dims: int) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape[num_dims:])} {value.dtype}"
    return type(value).__name__


def _as_rgb(image: Any, limits: Limits) -> Any:
    """Pictures that were decoded elsewhere, as ours are; anything else as it is."""
    if isinstance(image, bytes):  # of a function of the user's
        image = Decoded({"image": image}, limits)["image"]
    mode = getattr(image, "mode", "RGB")
    return image if mode == "RGB" or not hasattr(image, "convert") else image.convert("RGB")


def _find(decoded: Decoded, key: Key, argument: str, reason: str) -> Any:
    if callable(key):
        return key(decoded)
    for name in key.split(";"):
        if name in decoded:
            return decoded[name]
    known = sorted(name for name in decoded if not name.startswith("__"))
    what = (
        f"has no member for {argument}={key!r}, only {known} (should {argument} be one of these?)"
    )
    raise _bad(decoded, what, reason)


def _metadata(decoded: Decoded, key: Metadata, role: str) -> Any:
    """A member, or else an entry of the `json` member, or what the user's function makes of it."""
    if callable(key):
        return key(decoded)
    if key in decoded:
        return decoded[key]
    about = decoded["json"] if "json" in decoded else {}
    entries = about if isinstance(about, Mapping) else {}
    if key in entries:
        return entries[key]
    known = sorted({name for name in decoded if not name.startswith("__")} | entries.keys())
    raise _bad(decoded, f"has no {key!r} for {role}, only {known}", f"missing_{role}")


def _number(decoded: Decoded, term: Term) -> float:
    value = _metadata(decoded, term.value, "term")
    if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) != 1:
        raise ConfigError(
            f"Term(value={term.value!r}) must give one number per example, got shape "
            f"{list(value.shape)} for {decoded['__key__']!r}."
        )
    if isinstance(value, Sequence | Mapping) and not isinstance(value, str):
        raise ConfigError(
            f"Term(value={term.value!r}) must give one number per example, got a "
            f"{type(value).__name__} for {decoded['__key__']!r}. Pass a function that makes one "
            f"number of it."
        )
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise _bad(
            decoded, f"has {value!r} for {term.value!r}, no number", "unreadable_term"
        ) from error
    if not math.isfinite(number):
        raise _bad(decoded, f"has {number} for {term.value!r}", "non_finite_term")
    return number


def _group(decoded: Decoded, group_by: Metadata | tuple[str, ...]) -> Hashable:
    if isinstance(group_by, tuple):
        return tuple(_group(decoded, key) for key in group_by)
    value = _metadata(decoded, group_by, "group")
    if not isinstance(value, Hashable):
        raise ConfigError(
            f"group_by={group_by!r} must give a value that can be a key of quotas, got a "
            f"{type(value).__name__} for {decoded['__key__']!r}. Pass a function that makes one "
            f"of it."
        )
    return value


def _bad(decoded: Decoded, what: str, reason: str) -> BadExampleError:
    return BadExampleError(
        f"example {decoded['__key__']!r} {what}. Repair the data, pass a function that does "
        f'without, or on_bad_example="skip" to leave such examples out and count them.',
        key=str(decoded["__key__"]),
        shard=str(decoded.get("__shard__", "")),
        reason=reason,
    )


def _raw(example: Example, key: Key, image: Any) -> tuple[str, Any]:
    """The image as it was read, with the member's name that tells its decoder."""
    if callable(key):
        return "image", image
    name = next(name for name in key.split(";") if name in example)
    return name, example[name]


def _add(row: Row, name: str, view: Any, argument: str = "") -> None:
    """Puts a view into the row, without the batch dimension of one that processors add."""
    is_text = name.endswith("text")
    single_dim = 1 if is_text else 3
    if isinstance(view, Mapping):
        entries = {key: torch.as_tensor(value) for key, value in view.items()}
        # Of a processor that makes patches, images have two dimensions: all entries tell together.
        is_batch = len(entries) > 1 and all(
            entry.dim() > 1 and len(entry) == 1 for entry in entries.values()
        )
        for key, entry in entries.items():
            row[f"{name}/{key}"] = entry[0] if is_batch else _unbatched(entry, single_dim)
    elif isinstance(view, Tensor | np.ndarray):
        row[name] = _unbatched(torch.as_tensor(view), single_dim)
    elif is_text and isinstance(view, str):
        row[name] = view
    else:
        what, usual = ("text", "tokenizer") if is_text else ("image", "transform")
        raise ConfigError(
            f"{name} of example {row['key']!r} is a {type(view).__name__}, but models take "
            f"tensors (or mappings of tensors). Pass {argument or usual}=, a function that turns "
            f"the {what} into one."
        )


def _unbatched(tensor: Tensor, single_dim: int) -> Tensor:
    return tensor[0] if tensor.dim() == single_dim + 1 and len(tensor) == 1 else tensor
