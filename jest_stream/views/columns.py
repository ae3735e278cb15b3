"""Stacks rows of many examples to columns: few tensors to hand over. Pure functions.

`image` and `text` may each be one tensor or a mapping of tensors (as processors of transformers
return): a mapping's entries are named `image/pixel_values`, ….

Shapes: n: number of examples, D: embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jest_stream.errors import ConfigError
from jest_stream.types import REFERENCE_ROW, ReferenceRow
from jest_stream.views.rows import Row

Columns = dict[str, Any]
"""Each value holds one entry per example: a tensor `[n, …]`, or a list."""
REFERENCE = "reference_embeddings"
"""The view that holds the reference's embeddings of the examples: `[n, D]` images and texts."""
View = Tensor | dict[str, Tensor] | list[Any]
"""Image or text of n examples: `[n, …]`, named tensors `[n, …]`, or n plain strings."""


def collate(rows: list[Row], *, argument: str = "transform") -> Columns:
    """Returns the rows as columns: one tensor per field, so that a process hands over few.

    Args:
      rows: at least one; with the same entries in each.
      argument: name in messages of the transform that made their images.

    Raises:
      ConfigError: for tensors of different shapes.
    """
    keyed = [{**row, "key": [row["key"]]} for row in rows]
    require_same_fields(keyed, num_dims=0, argument=argument)
    columns: Columns = {
        name: torch.stack([row[name] for row in rows])
        if isinstance(rows[0][name], Tensor)
        else [row[name] for row in rows]
        for name in rows[0]
    }
    if REFERENCE_ROW in columns:
        image, text = gather_rows(columns.pop(REFERENCE_ROW))
        put_view(columns, REFERENCE, {"image": image, "text": text})
    return columns


def gather_rows(rows: Sequence[ReferenceRow]) -> tuple[Tensor, Tensor]:
    """Returns `[n, D]` image and text embeddings, copied out of the mapped files."""
    # Runs of rows of one record batch are copied together, and as a slice where they are
    # consecutive, as nearly always: rows 4, 5, 6 of one and 0, 1 of the next are two slices.
    parts: list[tuple[Tensor, Tensor]] = []
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop < len(rows) and rows[stop][0] is rows[start][0]:
            continue
        image, text, _, first = rows[start]
        wanted = [row[-1] for row in rows[start:stop]]
        end = first + len(wanted)
        if wanted == list(range(first, end)):
            parts.append((image[first:end].clone(), text[first:end].clone()))
        else:
            at = torch.tensor(wanted)
            parts.append((image[at], text[at]))
        start = stop
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def require_same_fields(
    parts: Sequence[Columns], *, num_dims: int = 1, argument: str = "transform"
) -> None:
    """Raises `ConfigError` unless all parts can be stacked: same names, shapes and dtypes.

    Args:
      parts: rows, or columns of several; `key` is a list in both.
      num_dims: leading dimensions in which they may differ.
      argument: name in messages of the transform that made the images.
    """
    first = parts[0] if parts else {}
    # Each is compared with the first, so that the message can name two examples.
    for part in parts[1:]:
        keys = f"{first['key'][0]!r} and {part['key'][0]!r}"
        if part.keys() != first.keys():
            differing = sorted(part.keys() ^ first.keys())
            raise ConfigError(
                f"the views of {keys} do not have the same entries: {differing} are in one of them "
                f"only. Let {argument} and tokenizer return the same names for every example."
            )
        for name, value in first.items():
            # Strings and other plain values are listed, and may be of any kind.
            is_stacked = isinstance(value, Tensor) or isinstance(part[name], Tensor)
            kinds = _kind(value, num_dims), _kind(part[name], num_dims)
            if is_stacked and kinds[0] != kinds[1]:
                raise ConfigError(
                    f"{name} must have one shape and dtype for all examples, to be stacked; "
                    f"{keys} have {kinds[0]} and {kinds[1]}. Let "
                    f"{argument} resize, crop and convert to RGB, and tokenizer pad to a fixed "
                    f"length."
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


def tensors_of(columns: Columns, name: str, taker: str) -> Tensor | dict[str, Tensor]:
    """Returns the view `name` as a model takes it.

    Raises:
      ConfigError: for a text that no tokenizer turned into a tensor; names the `taker`.
    """
    view = view_of(columns, name)
    if isinstance(view, list):
        raise ConfigError(
            f"{name} of example {columns['key'][0]!r} is a {type(view[0]).__name__}, but {taker} "
            f"takes tensors. Pass tokenizer=, a function that turns the text into one."
        )
    return view


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
