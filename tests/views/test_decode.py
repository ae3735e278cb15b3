"""Decoding follows an allow-list: no pickle on any path, no bombs, no broken data in silence."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.leaks import no_leaks  # noqa: F401
from support.live_pickles import pickled
from support.shards import draw, encode, make_example

from jest_stream.config import Limits
from jest_stream.errors import BadExampleError, UnsafeDataError, UnsafeExampleError
from jest_stream.views.decode import Decoded, decode

pytestmark = pytest.mark.usefixtures("no_leaks")


def decoded(name: str, value: Any, limits: Limits | None = None) -> Any:
    return decode({"__key__": "k", "__shard__": "s.tar", name: value}, name, limits or Limits())


def reason(name: str, value: Any) -> str:
    with pytest.raises(BadExampleError) as raised:
        decoded(name, value)
    assert (raised.value.key, raised.value.shard) == ("k", "s.tar")
    assert "'k'" in str(raised.value) and "s.tar" in str(raised.value)
    return raised.value.reason


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """Returns a PNG whose header claims any size; 1 bit per pixel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "gif"])
def test_images_become_loaded_rgb(kind: str) -> None:
    drawn, _ = draw(8)
    image = decoded(kind, encode(drawn, kind))
    assert (image.mode, image.size) == ("RGB", drawn.size)
    worst = np.abs(np.asarray(image).astype(int) - np.asarray(drawn).astype(int)).mean()
    assert worst < (0.1 if kind in ("png", "gif") else 8)


def test_text_numbers_json_and_arrays_become_values() -> None:
    assert decoded("txt", "grün\n".encode()) == "grün\n"
    assert decoded("cls", b" 17\n") == 17
    assert decoded("json", b'{"a": [1, null]}') == {"a": [1, None]}
    for array in (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.eye(3, dtype=np.uint8)), 0.5):
        stream = io.BytesIO()
        np.save(stream, array)
        assert np.array_equal(decoded("npy", stream.getvalue()), array)
        assert decoded("npy", stream.getvalue()).flags.writeable


def test_the_last_suffix_tells_the_kind_and_other_bytes_stay_bytes() -> None:
    assert decoded("caption.TXT", b"hi") == "hi"
    assert decoded("image", encode(draw(0)[0])).mode == "RGB"
    assert decoded("mp3", b"\x00\x01") == b"\x00\x01"


def test_what_is_ready_passes_as_it_is() -> None:
    image, tensor = draw(0)[0], torch.zeros(3)
    assert decoded("jpg", image) is image
    assert decoded("jpg", tensor) is tensor
    assert decoded("txt", "ready") == "ready"
    assert decoded("__key__", "k") == "k"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb_of_the_same_brightness(mode: str) -> None:
    grey = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    if mode == "I;16":
        stored = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        stored = Image.fromarray(grey).convert("RGB").convert(mode)
    data = encode(stored, "jpg" if mode == "CMYK" else "png")
    pixels = np.asarray(decoded("png", data)).astype(int)
    assert pixels.shape == (16, 16, 3)
    if mode != "1":
        assert np.abs(pixels - grey[..., None]).max() < 20  # P has 6 levels of grey


def test_a_palette_with_transparency_needs_no_warning() -> None:
    image = draw(0)[0].quantize(4)
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=bytes([0, 128, 255, 255]))
    assert decoded("png", stream.getvalue()).mode == "RGB"


def test_only_the_first_frame_of_an_animation_is_decoded() -> None:
    frames = [draw(index)[0] for index in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(decoded("gif", stream.getvalue())), np.asarray(frames[0]))


JPEG = encode(draw(1)[0])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("jpg", b"", "unreadable_image"),
        ("jpg", b"no image", "unreadable_image"),
        ("jpg", JPEG[:200], "unreadable_image"),
        ("jpg", JPEG[: len(JPEG) // 2], "unreadable_image"),
        ("jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable_image"),
        ("jpg", b"BM" + bytes(60), "unreadable_image"),
        ("png", png(8, 8, b"\xff"), "unreadable_image"),
        ("txt", b"\xff\xfe", "unreadable_text"),
        ("json", b"{", "unreadable_json"),
        ("json", b"\xff", "unreadable_json"),
        ("json", b"[" * 100_000, "unreadable_json"),
        ("json", b"9" * 100_000, "unreadable_json"),
        ("cls", b"seven", "unreadable_cls"),
        ("npy", b"\x93NUMPY\x01\x00", "unreadable_npy"),
        ("npy", b"", "unreadable_npy"),
    ],
)
def test_broken_members_are_bad_examples_with_a_reason(
    name: str, value: bytes, expected: str
) -> None:
    assert reason(name, value) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("png", png(50_000, 50_000)),  # 2.5 billion pixels: PIL itself refuses
        ("png", png(10_000, 10_000)),  # 100 million: PIL warns
        ("png", png(5_001, 5_000)),  # just above our own limit
        ("txt", b"x" * ((1 << 20) + 1)),
        ("json", b" " * (1 << 20) + b"1"),
    ],
)
def test_what_exceeds_a_limit_is_not_decoded(name: str, value: bytes) -> None:
    with pytest.raises(UnsafeExampleError, match="limit is|pixels") as raised:
        decoded(name, value)
    assert isinstance(raised.value, UnsafeDataError)
    assert raised.value.reason in ("unsafe_image", "unsafe_text", "unsafe_json")


def test_limits_can_be_set() -> None:
    with pytest.raises(UnsafeExampleError):
        decoded("jpg", JPEG, Limits(max_pixels=32 * 32 - 1))
    assert decoded("jpg", JPEG, Limits(max_pixels=32 * 32)).size == (32, 32)
    with pytest.raises(UnsafeExampleError):
        decoded("txt", b"abc", Limits(max_text_bytes=2))


def test_an_image_bomb_takes_no_memory(tmp_path: Path) -> None:
    """176 million pixels in 22 KB; decoding it took 1.3 GiB elsewhere. Own process: own peak."""
    width, height = 16_000, 11_000
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(width, height, bytes((width // 8 + 1) * height)))
    assert bomb.stat().st_size < 30_000
    script = """
import resource, sys, warnings
from PIL import Image, PngImagePlugin
from jest_stream.errors import UnsafeExampleError
from jest_stream.views.decode import decode
warnings.simplefilter("ignore")
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode({"__key__": "k", "png": data}, "png")
except UnsafeExampleError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", script, str(bomb)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # KiB


@pytest.mark.parametrize("name", ["pkl", "pyd", "pickle", "pth", "pt", "npz", "x.PKL", "ckpt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeDataError, match="can run code") as raised:
        decoded(name, pickled(tmp_path / "canary", "pkl"))
    assert not isinstance(raised.value, BadExampleError)  # not to be skipped: it is asked for
    assert not (tmp_path / "canary").exists()


def test_arrays_of_objects_are_never_opened(tmp_path: Path) -> None:
    with pytest.raises(UnsafeExampleError, match="Python objects"):
        decoded("npy", pickled(tmp_path / "canary", "npy"))
    assert not (tmp_path / "canary").exists()


def test_an_array_whose_header_lies_allocates_nothing() -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)}
    )
    assert reason("npy", stream.getvalue()) == "unreadable_npy"


@pytest.mark.parametrize("header", ["-" * 9_000 + "1", "(" * 9_000, "+".join(["1j"] * 3_000)])
def test_an_array_whose_header_is_too_much_for_the_parser_is_a_bad_example(header: str) -> None:
    """Python's parser raises MemoryError and others, which would end training if they got out."""
    magic = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header))
    assert reason("npy", magic + header.encode()) == "unreadable_npy"


def test_a_decoded_view_decodes_each_member_once_and_only_when_asked() -> None:
    example = {**make_example(5), "pkl": b"never touched", "bad.jpg": b"never touched"}
    view = Decoded(example)
    assert set(view) == set(example) and len(view) == len(example)
    assert "jpg" in view and "webp" not in view
    assert view["json"]["caption"] == view["txt"] == "a orange circle"
    assert view["jpg"] is view["jpg"]
    assert isinstance(example["jpg"], bytes)


def test_a_missing_member_is_a_bad_example_and_a_key_error() -> None:
    view = Decoded({"__key__": "k", "__shard__": "s.tar", "jpg": JPEG, "txt": b"t"})
    assert view.get("json", {}) == {}
    with pytest.raises(KeyError):
        view["json"]
    with pytest.raises(BadExampleError, match=r"'k' of shard 's.tar' .* 'json', only jpg, txt"):
        view["json"]
    copy = pickle.loads(pickle.dumps(pytest.raises(BadExampleError, view.__getitem__, "a").value))
    assert (copy.reason, copy.key) == ("missing_member", "k")
    assert str(copy).startswith("example 'k'")


def test_values_without_a_key_can_be_decoded_too() -> None:
    assert Decoded({"txt": json.dumps("x").encode()})["txt"] == '"x"'
    assert "example ''" in str(pytest.raises(BadExampleError, Decoded({}).__getitem__, "a").value)
