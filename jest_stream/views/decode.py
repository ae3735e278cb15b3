"""Decodes members of examples by an allow-list: data of strangers never run code.

In: an example as a source yields it. Out: PIL images (RGB, loaded), strings, numbers, parsed json,
arrays. The limits are checked before memory is taken. Values that are no bytes pass as they are.
Runs where the examples are read, in worker processes if there are any. Pure.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jest_stream.config import DEFAULT_LIMITS, Limits
from jest_stream.errors import BadExampleError, UnsafeDataError, UnsafeExampleError
from jest_stream.types import Example

if TYPE_CHECKING:
    from PIL import Image

_IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
# The errors of decoders on broken data: 60,000 mutated images gave OSError (without a number),
# SyntaxError and ValueError. TypeError, NameError and their like are mistakes in programs.
_BROKEN_DATA = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    RecursionError,
    SyntaxError,
    ValueError,
    Warning,  # where the user made them errors
    struct.error,
    zlib.error,
)
_REFUSED = frozenset("pyd pkl pickle pth pt ckpt npz joblib dill cloudpickle".split())


class MissingMemberError(BadExampleError, KeyError):
    """An example without the member that was asked for; a `KeyError`, so that `get` works."""

    __str__ = Exception.__str__  # that of KeyError shows the message in quotes


class Decoded(Mapping[str, Any]):
    """A view of an example whose members are decoded when they are first asked for.

    User functions get one: `text_key=lambda example: example["json"]["caption"]`.
    """

    def __init__(self, example: Mapping[str, Any], limits: Limits = DEFAULT_LIMITS) -> None:
        self._example = example
        self._limits = limits
        self._values: Example = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            self._values[name] = decode(self._example, name, self._limits)
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._example  # does not decode

    def __iter__(self) -> Iterator[str]:
        return iter(self._example)

    def __len__(self) -> int:
        return len(self._example)

    def __repr__(self) -> str:
        return f"<Decoded {title_of(self._example)} | {_names(self._example)}>"


class Reduced(NamedTuple):
    """An image that was decoded at a fraction of its size."""

    image: Image.Image
    full_size: tuple[int, int]
    """Width and height before."""
    box: tuple[float, float, float, float]
    """Place of the full image in the reduced one, in its pixels: left, top, right, bottom. A JPEG
    of 501 x 375, divided by 4, has 126 x 94 pixels, and the full one covers 125.25 x 93.75."""


Shrink = Callable[[tuple[int, int]], int]
"""Takes width and height; returns 1, 2, 4 or 8, the divisor of both while an image is decoded."""


def decode(
    example: Mapping[str, Any],
    name: str,
    limits: Limits = DEFAULT_LIMITS,
    *,
    shrink: Shrink | None = None,
) -> Any:
    """Returns the value of a member; the last suffix of its name chooses the decoder.

    `jpg jpeg png webp gif image` (first frame) become a loaded PIL image, RGB; `txt` and `text` a
    str; `json` its content; `cls` an int; `npy` an array. Bytes of any other name are returned as
    they are, for the user's own function.

    With `shrink`, JPEGs that it divides become `Reduced`: their decoder leaves out the fine part of
    the cosine transform. The limits hold for the full size all the same.

    Raises:
      BadExampleError: if the member is missing (also a `KeyError`), unreadable, or over a limit
        (an `UnsafeExampleError`).
      UnsafeDataError: for kinds that can hold pickles: they are never opened.
    """
    if name not in example:
        raise MissingMemberError(
            f"{title_of(example)} has no member {name!r}, only {_names(example)}. Name a member "
            "that every example has.",
            **place_of(example),
            reason="missing_member",
        )
    # There are four cases:
    # 1. A value that is no bytes, or an entry of ours: returned as it is.
    # 2. A kind that can hold pickles: refused by its name, before it is looked at.
    # 3. A kind without a decoder: bytes, for the user's own function.
    # 4. A kind with one: decoded. Its errors become those of a bad example, unless the system is to
    #    blame.
    value = example[name]
    kind = name.rpartition(".")[2].lower()
    if not isinstance(value, bytes) or name.startswith("__"):
        return value
    if kind in _REFUSED:
        raise UnsafeDataError(
            f"member {name!r} of {title_of(example)} is of a kind that can run code when opened "
            "(pickle and its like); it never is. Store arrays as npy, text as txt or json."
        )
    decoder = _DECODERS.get(kind)
    if decoder is None:
        return value
    try:
        if decoder is _image:
            return _image(value, limits, shrink)
        return decoder(value, limits)
    except _Unsafe as error:
        raise UnsafeExampleError(
            f"member {name!r} of {title_of(example)} is left undecoded: it {error}. Remove it, or "
            "skip bad examples.",
            **place_of(example),
            reason=f"unsafe_{_decoder_name(kind)}",
        ) from error
    except _BROKEN_DATA as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the system (no descriptors left, say) is no fault of the data
        raise BadExampleError(
            f"member {name!r} of {title_of(example)} cannot be decoded as {_decoder_name(kind)} "
            f"({type(error).__name__}: {error}). Repair the data, or skip bad examples.",
            **place_of(example),
            reason=f"unreadable_{_decoder_name(kind)}",
        ) from error


class _Unsafe(Exception):
    """The reason that forbids to decode a member."""


def _image(data: bytes, limits: Limits, shrink: Shrink | None = None) -> Image.Image | Reduced:
    from PIL import Image

    # Size first, by the header alone: 1 MB of PNG can unpack to gigabytes. The webp decoder takes
    # memory for all pixels when it is opened, so its header is read here.
    _check_pixels(_webp_size(data), limits)
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    box = None
    try:
        image = _opened(data)
        full_size = image.size
        _check_pixels(full_size, limits)  # only the header has been read so far
        factor = 1 if shrink is None or image.format != "JPEG" else shrink(full_size)
        if factor > 1:
            drafted = image.draft(None, (full_size[0] // factor, full_size[1] // factor))
            box = None if drafted is None else drafted[1]
        image.load()
    except bombs as error:
        raise _Unsafe(
            f"has more pixels than PIL allows, max_pixels notwithstanding ({error})"
        ) from error
    image = _as_rgb(image)
    return image if box is None else Reduced(image, full_size, box)


def _as_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB":
        return image  # `convert` would copy it
    if image.mode.startswith("I"):  # 16 bits: PIL clips to 255, which leaves a white image
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the way that PIL does not warn about
    return image.convert("RGB")


def _opened(data: bytes) -> Image.Image:
    """Returns an image of which the header has been read."""
    from PIL import Image, JpegImagePlugin

    if data.startswith(b"\xff\xd8\xff"):
        try:  # without asking all formats first: 120 us for one of 96 px instead of 128
            return JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        except SyntaxError:
            pass  # PIL's general way, below, has the better message
    return Image.open(io.BytesIO(data), formats=_IMAGE_FORMATS)


def _check_pixels(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise _Unsafe(
            f"has {width} x {height} = {width * height:,} pixels, the limit is "
            f"{limits.max_pixels:,}"
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Returns the size that a webp's header promises; zeros for anything else."""
    # There are three kinds of header: extended (VP8X, sizes less one in 24 bits), lossless (VP8L,
    # sizes less one in 14 bits each) and lossy (VP8, sizes in the low 14 bits of two words).
    head = data[:30]
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return 0, 0
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", head[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _text(data: bytes, limits: Limits) -> str:
    _check_length(data, limits)
    return data.decode("utf-8")


def _json(data: bytes, limits: Limits) -> Any:
    _check_length(data, limits)
    return json.loads(data.decode("utf-8"))


def _cls(data: bytes, limits: Limits) -> int:
    _check_length(data, limits)
    return int(data.decode("ascii"))


def _npy(data: bytes, limits: Limits) -> np.ndarray[Any, np.dtype[Any]]:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    try:
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"npy format {version} is not supported")
    except (MemoryError, TokenError) as error:  # of Python's parser: 10,000 bytes are the most
        raise ValueError("its header cannot be parsed") from error
    if dtype.hasobject:
        raise _Unsafe("holds Python objects, which are pickles")
    # A header of (10**9,) over 8 bytes of data must not take memory: the lengths must agree.
    count, start = math.prod(shape), stream.tell()
    if count * dtype.itemsize != len(data) - start:
        raise ValueError(f"{len(data) - start} bytes do not make {shape} of {dtype}")
    array: np.ndarray[Any, np.dtype[Any]] = np.frombuffer(data, dtype, count, start).copy()
    return array.reshape(shape, order="F" if is_fortran else "C")


_DECODERS: dict[str, Callable[[bytes, Limits], Any]] = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "image"), _image),
    **dict.fromkeys(("txt", "text"), _text),
    "json": _json,
    "cls": _cls,
    "npy": _npy,
}


def _check_length(data: bytes, limits: Limits) -> None:
    if len(data) > limits.max_text_bytes:
        raise _Unsafe(f"has {len(data):,} bytes, the limit is {limits.max_text_bytes:,}")


def _decoder_name(kind: str) -> str:
    """Returns the decoder's name, as it stands in reasons: `image` for `jpg`."""
    return _DECODERS[kind].__name__.lstrip("_")


def place_of(example: Mapping[str, Any]) -> dict[str, str]:
    """Returns key and shard of an example, as the errors of examples take them."""
    return {"key": str(example.get("__key__", "")), "shard": str(example.get("__shard__", ""))}


def title_of(example: Mapping[str, Any]) -> str:
    """Returns the name of an example in messages."""
    place = place_of(example)
    shard = f" of shard {place['shard']!r}" if place["shard"] else ""
    return f"example {place['key']!r}{shard}"


def _names(example: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name for name in example if not name.startswith("__"))) or "nothing"
