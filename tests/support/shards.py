"""Tests read real shards: small drawn pictures with captions that say what is on them.

`write_shards(folder)` has webdataset write tar files, `write_tar` writes any members at all.
Everything is seeded: the same arguments give the same bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 80),
    "blue": (38, 84, 200),
    "yellow": (244, 200, 30),
    "purple": (120, 50, 160),
    "orange": (244, 140, 30),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "bar")


def draw(index: int, size: int = 32) -> tuple[Image.Image, str]:
    """Returns picture number `index`, RGB, and its caption; 35 kinds, shifted within a kind."""
    colour = list(COLOURS)[index % len(COLOURS)]
    shape = SHAPES[index // len(COLOURS) % len(SHAPES)]
    image = Image.new("RGB", (size, size), (245, 245, 245))
    pen = ImageDraw.Draw(image)
    fill = COLOURS[colour]
    shift = index // 35 % max(size // 8, 1)
    low, high, middle = size // 8 + shift, size * 3 // 4 + shift, size // 2
    if shape == "circle":
        pen.ellipse((low, low, high, high), fill=fill)
    elif shape == "square":
        pen.rectangle((low, low, high, high), fill=fill)
    elif shape == "triangle":
        pen.polygon(((middle, low), (high, high), (low, high)), fill=fill)
    elif shape == "cross":
        pen.line((low, low, high, high), fill=fill, width=max(size // 8, 1))
        pen.line((low, high, high, low), fill=fill, width=max(size // 8, 1))
    else:
        pen.rectangle((low, middle - size // 10, high, middle + size // 10), fill=fill)
    return image, f"a {colour} {shape}"


def encode(image: Image.Image, image_format: str = "jpg") -> bytes:
    """Returns the image as the bytes of a file: `jpg`, `png`, `webp` or `gif`."""
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG"}.get(image_format, image_format.upper()))
    return buffer.getvalue()


def make_example(
    index: int, *, size: int = 32, image_format: str = "jpg", prefix: str = ""
) -> dict[str, Any]:
    """Returns an encoded example as a tar source reads it, without `__shard__`."""
    image, caption = draw(index, size)
    record = {"index": index, "caption": caption, "size": size}
    return {
        "__key__": f"{prefix}{index:06d}",
        image_format: encode(image, image_format),
        "txt": caption.encode(),
        "json": json.dumps(record).encode(),
    }


def members(examples: Iterable[dict[str, Any]]) -> list[tuple[str, bytes]]:
    """Returns the tar members of examples, in order: `(KEY.EXTENSION, bytes)`."""
    return [
        (f"{example['__key__']}.{name}", data)
        for example in examples
        for name, data in example.items()
        if not name.startswith("__")
    ]


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], *, format: int | None = None) -> str:
    """Writes members as they are given, duplicates too; returns the path."""
    with tarfile.open(path, "w", format=format or tarfile.USTAR_FORMAT) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def write_shards(
    folder: Path,
    *,
    num_shards: int = 4,
    examples_per_shard: int = 16,
    size: int = 32,
    image_format: str = "jpg",
) -> list[str]:
    """Writes `folder/00000.tar`, ...; returns the paths. Keys are `000000`, ... over all shards.

    Examples hold an image, `txt` (caption) and `json` (`index`, `caption`, `size`). Brace pattern
    of the result: `f"{folder}/{{00000..00003}}.tar"`.
    """
    from webdataset import TarWriter

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(num_shards):
        path, first = folder / f"{shard:05d}.tar", shard * examples_per_shard
        # A fixed time: the same arguments give the same bytes.
        with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as archive:
            for index in range(first, first + examples_per_shard):
                archive.write(make_example(index, size=size, image_format=image_format))
        paths.append(str(path))
    return paths
