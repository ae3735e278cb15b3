"""Chooses the columns of a table that make an example, and makes examples of its rows.

In: an Arrow schema, with the features that Hugging Face's libraries write into it, and the columns
that the user named. Out: `Fields`; then, row by row, examples with `image` (encoded bytes) and
`text` beside the columns of metadata. Imports no Arrow, since the schema brings its types. Pure
functions, but for image files that a row names by path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jest_stream.config import DEFAULT_LIMITS
from jest_stream.errors import (
    BadExampleError,
    ConfigError,
    ShardUnavailableError,
    UnsafeExampleError,
)
from jest_stream.storage import Storage, scheme_of
from jest_stream.types import REFERENCE_ROW, Example

# Usual names of columns, best first. They decide where several columns could be meant.
_IMAGE_NAMES = "image jpg jpeg png webp gif img picture photo".split()
_TEXT_NAMES = "text caption txt captions alt_text alt title description prompt".split()

# Names that `JESTDataset` looks for by default. A column of such a name that was not chosen is left
# out: it would be taken for the chosen one.
_ROLE_NAMES = frozenset("image jpg jpeg png webp gif text txt".split())
_MAX_IMAGE_BYTES = 256 << 20  # of a file that a row names by path
# Entries of an example that are ours.
_OWN_NAMES = frozenset(("__key__", "__shard__", REFERENCE_ROW))


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The columns of a table that are read."""

    image: str
    """Column of the images; within a struct as in `"sample.image"`."""
    text: str
    """Column of the texts, likewise."""
    image_column: str
    """Top-level column that holds the images."""
    text_column: str
    """Top-level column that holds the texts."""
    is_struct: bool
    """Whether an image is a struct of `bytes` and `path`, as the Hub's libraries store it."""
    others: tuple[str, ...]
    """Columns of metadata: numbers, strings, and lists or structs of these; `text` if top level."""

    @property
    def image_leaf(self) -> str:
        """The Parquet column that holds the bytes of the images."""
        return f"{self.image}.bytes" if self.is_struct else self.image

    @property
    def columns(self) -> tuple[str, ...]:
        """Top-level columns that are needed."""
        return tuple(dict.fromkeys((self.image_column, *self.metadata)))

    @property
    def metadata(self) -> tuple[str, ...]:
        """Top-level columns that are needed beside the image."""
        return tuple(dict.fromkeys((*self.others, self.text_column)))


def fields_of(schema: Any, image_key: str | None, text_key: str | None, title: str) -> Fields:
    """Returns the columns of an Arrow schema that make an example.

    Args:
      schema: a `pyarrow.Schema`.
      image_key: the user's column of images; None to find it.
      text_key: the user's column of texts, likewise.
      title: name of the table in messages.

    Raises:
      ConfigError: if a column is missing or of a type that cannot be meant, and if none or several
        can be found; with all columns of the table.
    """
    fields = {field.name: field.type for field in schema}
    images = {name for name, type_ in fields.items() if _is_image_struct(type_)}
    images |= {name for name in _declared_images(schema) if name in fields}
    binary = [name for name, type_ in fields.items() if _is_binary(type_)]
    texts = [name for name, type_ in fields.items() if _is_string(type_) and name[:2] != "__"]
    shown = f"{title} has the columns " + (
        ", ".join(f"{name} ({type_})" for name, type_ in fields.items())[:1000] or "(none)"
    )
    named_binary = [name for name in binary if name in _IMAGE_NAMES]
    # The column of images is, in this order: 1. the user's; 2. one declared as images, or a struct
    # of bytes and path; 3. one of bytes with a usual name; 4. one of bytes.
    image = image_key or _choose(sorted(images) or named_binary or binary, "image", shown)
    image_type = _type_of(fields, image, "image_key", shown)
    if not _is_image_struct(image_type) and not _is_binary(image_type):
        raise ConfigError(
            f"image_key={image!r} is a column of {image_type}, but images are read from bytes, or "
            f"structs of bytes and path. {shown}."
        )
    text = text_key or _choose([name for name in texts if name != image], "text", shown)
    text_type = _type_of(fields, text, "text_key", shown)
    if not _is_string(text_type) and not _is_binary(text_type):
        raise ConfigError(
            f"text_key={text!r} is a column of {text_type}, but a text is a string. {shown}. Make "
            "a column of strings, with datasets: dataset.map(...)."
        )
    return Fields(
        image=image,
        text=text,
        image_column=_top_of(fields, image),
        text_column=_top_of(fields, text),
        is_struct=_is_image_struct(image_type),
        others=_others(
            (name for name, type_ in fields.items() if _is_metadata(type_)), image, text
        ),
    )


def fields_of_row(
    row: Mapping[str, Any], image_key: str | None, text_key: str | None, title: str
) -> Fields:
    """Returns the columns that make an example, by a first row, where no schema is known.

    Raises:
      ConfigError: as `fields_of`.
    """
    kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
    shown = f"{title} has the columns {kinds[:1000]}"
    for argument, key in (("image_key", image_key), ("text_key", text_key)):
        if key is not None and key not in row and _value(row, key) is None:
            raise ConfigError(f"{argument}={key!r} is no column. {shown}.")
    images = [name for name, value in row.items() if _looks_like_image(value)]
    texts = [name for name, value in row.items() if isinstance(value, str) and name[:2] != "__"]
    image = image_key or _choose(images, "image", shown)
    text = text_key or _choose([name for name in texts if name != image], "text", shown)
    others = _others((name for name in row if name not in images), image, text)
    return Fields(
        image=image,
        text=text,
        image_column=_top_of(row, image),
        text_column=_top_of(row, text),
        is_struct=False,
        others=others,
    )


def example_of(
    row: Mapping[str, Any] | UnicodeDecodeError,
    fields: Fields,
    *,
    key: str,
    shard: str,
    opens_paths: bool = False,
) -> Example | BadExampleError:
    """Returns the example of a row; values that are null are left out.

    Args:
      row: values by column, or the error of a row whose text is not UTF-8.
      fields: the columns to take.
      key: the example's key, unless the row has a `__key__`, a string or a number.
      shard: name of the shard in messages.
      opens_paths: whether an image of which only the path is stored is read from this disk; else
        it is a bad example. Only for tables of this machine: a stranger's may name any file.
    """
    if isinstance(row, UnicodeDecodeError):
        return BadExampleError(
            f"example {key!r} of {shard!r} holds a string that is not UTF-8 ({row.reason}). Write "
            "it again, or skip bad examples.",
            key=key,
            shard=shard,
            reason="unreadable_text",
        )
    own_key = row.get("__key__")
    if isinstance(own_key, str | int) and own_key != "":
        key = str(own_key)
    example: Example = {"__key__": key, "__shard__": shard}
    for name in fields.others:
        if name not in _OWN_NAMES and row.get(name) is not None:
            example[name] = row[name]
    text = _value(row, fields.text)
    if text is not None:
        if isinstance(text, str) and len(text) > DEFAULT_LIMITS.max_text_bytes:
            return UnsafeExampleError(
                f"text {fields.text!r} of example {key!r} of {shard!r} has {len(text):,} "
                f"characters, the limit is {DEFAULT_LIMITS.max_text_bytes:,}. Is it a caption?",
                key=key,
                shard=shard,
                reason="unsafe_text",
            )
        example["text"] = text
    image = _value(row, fields.image)
    # An image is 1. the bytes themselves, 2. a struct that holds them, 3. a struct with a path
    # only, 4. null, which leaves the example without an image.
    if isinstance(image, Mapping):
        data, path = image.get("bytes"), image.get("path")
        if data is None and path:
            if not opens_paths:
                return _path_only(key, shard, path)
            try:
                data = _load_image(str(path))
            except BadExampleError as error:
                return error
        image = data
    if image is not None:
        example["image"] = bytes(image) if isinstance(image, bytearray | memoryview) else image
    return example


def _path_only(key: str, shard: str, path: str) -> BadExampleError:
    return BadExampleError(
        f"the image of example {key!r} of {shard!r} is not in the table, only a path to it "
        f"({path!r}), which is not followed. Embed the images: dataset.push_to_hub(...) does, and "
        "so does dataset.save_to_disk(...).",
        key=key,
        shard=shard,
        reason="image_not_embedded",
    )


def _load_image(path: str) -> bytes:
    """Returns the bytes of a local file. Addresses are refused, since a row may name any host."""
    fault, cause = "is not a local file; the row should hold the image's bytes", None
    if "://" not in path and "::" not in path and not scheme_of(path):
        try:
            with Storage().open(path) as file:
                data = file.read(_MAX_IMAGE_BYTES + 1)
            if len(data) <= _MAX_IMAGE_BYTES:
                return data
            fault = f"is larger than {_MAX_IMAGE_BYTES:,} bytes"
        except ShardUnavailableError as error:
            fault, cause = "cannot be opened", error
    raise BadExampleError(
        f"image {path!r}, which the dataset names, {fault}. Embed the images in the dataset, or "
        "skip bad examples.",
        key=path,
        reason="image_not_embedded",
    ) from cause


def _choose(names: list[str], role: str, shown: str) -> str:
    """Returns the one column that can be meant."""
    # Of "url", "caption" and "alt" the caption is chosen, since it is the first usual name. Of "a"
    # and "b" none is: the user has to name one.
    known = _IMAGE_NAMES if role == "image" else _TEXT_NAMES
    if len(names) > 1:
        names = [name for name in known if name in names][:1] or names
    if len(names) == 1:
        return names[0]
    found = f"{len(names)} columns that could be the {role}" if names else f"no column of {role}s"
    raise ConfigError(
        f"{shown}: {found}. Name it: HuggingFaceSource(..., {role}_key=...), or pass "
        "IterableSource(dataset) to get its examples as they are."
    )


def _others(names: Iterable[str], image: str, text: str) -> tuple[str, ...]:
    """Columns of metadata, less those that would be taken for the image or the text."""
    return tuple(
        name for name in names if name == text or (name != image and name not in _ROLE_NAMES)
    )


def _top_of(columns: Mapping[str, Any], key: str) -> str:
    """Returns the top-level column that a key names or lies in; names may hold dots themselves."""
    return key if key in columns else key.partition(".")[0]


def _declared_images(schema: Any) -> list[str]:
    """Returns the columns that Hugging Face's metadata of the schema declares to be images."""
    metadata = schema.metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return [name for name, feature in features.items() if feature.get("_type") == "Image"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []  # a stranger's file: its declaration is a hint


def _type_of(fields: Mapping[str, Any], key: str, argument: str, shown: str) -> Any:
    """Returns the Arrow type of a column, looked up within structs too."""
    if key in fields:
        return fields[key]
    name, _, path = key.partition(".")
    found: Any = fields.get(name)
    for part in path.split("."):
        inner = {field.name: field.type for field in found} if _is_struct(found) else {}
        found = inner.get(part)
    if found is None:
        raise ConfigError(f"{argument}={key!r} is no column. {shown}.")
    return found


def _value(row: Mapping[str, Any], key: str) -> Any:
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _looks_like_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "bytes" in value
    return isinstance(value, bytes) or hasattr(value, "convert")


def _is_struct(type_: Any) -> bool:
    # This and the next functions tell Arrow's types by their names: no Arrow is imported here.
    return type_ is not None and str(type_).startswith("struct<")


def _is_image_struct(type_: Any) -> bool:
    return _is_struct(type_) and any(
        field.name == "bytes" and _is_binary(field.type) for field in type_
    )


def _is_binary(type_: Any) -> bool:
    return str(type_) in ("binary", "large_binary", "binary_view")


def _is_string(type_: Any) -> bool:
    name = str(type_)
    return name in ("string", "large_string", "string_view") or (
        name.startswith("dictionary<values=string,")
    )


def _is_metadata(type_: Any) -> bool:
    """Tells whether every value is plain: numbers, strings, lists and structs of these."""
    name = str(type_)
    if _is_struct(type_):
        return all(_is_metadata(field.type) for field in type_)
    if name.startswith(("list<", "large_list<", "fixed_size_list<")):
        return _is_metadata(type_.value_type)
    numbers = name in ("bool", "halffloat", "float", "double") or (
        name.removeprefix("u") in ("int8", "int16", "int32", "int64")
    )
    return numbers or _is_string(type_)
