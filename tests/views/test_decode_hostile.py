"""Hostile members, bombs and pickles, end in errors under a real memory limit, on every path.

pytest tests/views/test_decode_hostile.py
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.leaks import no_leaks
from support.live_pickles import jest, pickled
from support.models import to_tensor
from support.shards import draw, encode, make_example, members, write_tar

from jest_stream.config import Limits
from jest_stream.errors import BadExampleError, UnsafeDataError, UnsafeExampleError
from jest_stream.views import decode
from jest_stream.views.decode import Decoded

__all__ = ["no_leaks"]
pytestmark = pytest.mark.usefixtures("no_leaks")

WORKERS = [0, 2]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int) -> bytes:
    """176 million pixels, all of them there, take 22 KB."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes((width // 8 + 1) * height), 9)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def webp(width: int, height: int) -> bytes:
    """An animation of one small frame on a canvas of any size; its decoder takes all of it."""
    frames = [draw(0)[0], draw(1)[0]]
    stream = io.BytesIO()
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(stream.getvalue())
    assert data[12:16] == b"VP8X"
    data[24:27] = (width - 1).to_bytes(3, "little")
    data[27:30] = (height - 1).to_bytes(3, "little")
    return bytes(data)


def gif(width: int, height: int) -> bytes:
    data = bytearray(encode(draw(0)[0], "gif"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def npy(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    header: dict[str, Any] = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


# Name: suffix, bytes, and the error and reason raised.
BOMBS: dict[str, tuple[str, bytes, str]] = {
    "png": ("png", png(16_000, 11_000), "UnsafeExampleError unsafe_image"),
    "webp": ("webp", webp(16_000, 11_000), "UnsafeExampleError unsafe_image"),
    "gif": ("gif", gif(60_000, 60_000), "UnsafeExampleError unsafe_image"),
    "npy": ("npy", npy((1 << 40,)), "BadExampleError unreadable_npy"),
    "text": ("txt", b"x" * (2 << 20), "UnsafeExampleError unsafe_text"),
    "deep json": ("json", b"[" * (1 << 20), "BadExampleError unreadable_json"),
    "wide json": ("json", b"[" + b"[]," * (1 << 20) + b"[]]", "UnsafeExampleError unsafe_json"),
    "digits": ("cls", b"9" * (1 << 20), "BadExampleError unreadable_cls"),
}

LIMITED = """
import resource, sys
import numpy as np, PIL.Image, PIL.WebPImagePlugin, PIL.GifImagePlugin, PIL.PngImagePlugin
from jest_stream.errors import BadExampleError, UnsafeDataError
from jest_stream.sources import TarSource
from jest_stream.views.decode import decode
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
limit = used + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    try:
        for example, _ in TarSource(path).read(0):
            for name in [name for name in example if not name.startswith("__")]:
                decode(example, name)
    except (BadExampleError, UnsafeDataError) as error:
        print(type(error).__name__, getattr(error, "reason", ""))
"""


def write_zeros(path: Path, num_members: int) -> str:
    """One example of 40 GB, in one member or in many, that takes no space on the disk."""
    with path.open("wb") as file:
        for number in range(num_members):
            info = tarfile.TarInfo(f"0.m{number}")
            info.size = (40 << 30) // num_members
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(info.size, 1)
        file.truncate(file.tell() + 10_240)
    return str(path)


def test_bombs_take_no_more_memory_than_there_is(tmp_path: Path) -> None:
    """In a process that may have 200 MB more than when it is idle."""
    paths = [
        write_tar(tmp_path / f"{bomb}.tar", [(f"0.{name}", data)])
        for bomb, (name, data, _) in BOMBS.items()
    ]
    expected = [raised for _, _, raised in BOMBS.values()]
    paths += [write_zeros(tmp_path / f"{count}.tar", count) for count in (1, 40)]
    expected += ["UnsafeDataError"] * 2
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, *paths],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [line.strip() for line in done.stdout.splitlines()] == expected


@pytest.mark.parametrize("kind", ["VP8", "VP8L", "VP8X"])
def test_the_size_of_a_webp_is_known_before_its_decoder_is(kind: str) -> None:
    image = draw(3)[0].resize((57, 91))
    stream = io.BytesIO()
    if kind == "VP8X":
        image.save(stream, "WEBP", save_all=True, append_images=[draw(1)[0].resize((57, 91))])
    else:
        image.save(stream, "WEBP", lossless=kind == "VP8L")
    data = stream.getvalue()
    assert data[12:16].strip() == kind.encode()
    example = {"__key__": "k", "webp": data}
    assert decode.decode(example, "webp", Limits(max_pixels=57 * 91)).size == (57, 91)
    with pytest.raises(UnsafeExampleError, match=r"57 x 91 = 5,187 pixels, the limit is 5,186"):
        decode.decode(example, "webp", Limits(max_pixels=57 * 91 - 1))


def test_pixels_beyond_what_pil_allows_are_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(draw(0)[0], "png")
    with pytest.raises(UnsafeExampleError, match="more pixels than PIL allows"):
        decode.decode({"__key__": "k", "png": data}, "png")


@pytest.mark.parametrize(
    "error",
    [
        NameError("n"),
        TypeError("t"),
        AttributeError("a"),
        ImportError("i"),
        MemoryError("m"),
        OSError(24, "Too many open files"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_mistakes_of_programs_and_systems_are_no_bad_examples(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(type(error)) as raised:
        decode.decode({"__key__": "k", "jpg": b"x" * 40}, "jpg")
    assert raised.value is error


@pytest.mark.parametrize("name", ["max_pixels", "max_text_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
def test_limits_that_mean_nothing_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"Limits.{name} must be an integer"):
        Limits(**{name: value})


PATHS: dict[str, Callable[[str], dict[str, Any]]] = {
    "image_key": lambda kind: {"image_key": kind},
    "text_key": lambda kind: {"text_key": kind},
    "a function": lambda kind: {"text_key": lambda example: str(example[kind])},
    "train_transform": lambda kind: {"image_key": kind, "train_transform": to_tensor},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_workers", WORKERS)
def test_no_path_into_a_batch_opens_a_pickle(tmp_path: Path, path: str, num_workers: int) -> None:
    for number, kind in enumerate(["pkl", "pyd", "pickle", "pth", "pt", "npz", "npy", "meta.pkl"]):
        data = pickled(tmp_path / "canary", kind.rpartition(".")[2])
        examples = [{**make_example(index), kind: data} for index in range(4)]
        shard = write_tar(tmp_path / f"{number}.tar", members(examples))
        for source in (shard, examples) if num_workers == 0 else (shard,):
            with pytest.raises((UnsafeDataError, BadExampleError)):
                list(jest(source, **PATHS[path](kind), num_workers=num_workers))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["jpg", "png", "txt", "json", "cls", "npy", "image", "text"])
def test_a_pickle_under_a_harmless_name_is_only_unreadable(tmp_path: Path, name: str) -> None:
    example = {"__key__": "k", name: pickled(tmp_path / "canary", "pkl")}
    with pytest.raises(BadExampleError):
        Decoded(example)[name]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("num_workers", WORKERS)
def test_pickles_beside_what_is_read_are_passed_over(tmp_path: Path, num_workers: int) -> None:
    data = pickled(tmp_path / "canary", "pkl")
    examples = [{**make_example(index), "pkl": data, "pth": data} for index in range(8)]
    shard = write_tar(tmp_path / "0.tar", members(examples))
    assert len(list(jest(shard, num_workers=num_workers))) > 0
    assert not (tmp_path / "canary").exists()
