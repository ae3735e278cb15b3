"""SVG in, lossless WebP bytes out: square RGB pictures on white, exact duplicates dropped.

Drawings with more than 64 colours are reduced to 64, which halves the bytes of emoji and is hard
to see at 32 px. A drawing that fails or renders blank is dropped and counted, never fatal.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial

import resvg_py
from catalogue import Icon
from PIL import Image

MAX_COLOURS = 64


def render_all(
    icons: Iterable[Icon], *, size: int, jobs: int, dropped: Counter[str]
) -> Iterator[tuple[Icon, bytes]]:
    """Yields each icon with its picture, in the given order, the first of exact duplicates only.

    Args:
      icons: the drawings.
      size: edge of the pictures in pixels.
      jobs: processes that render.
      dropped: counts the drawings left out, by reason; added to.
    """
    seen: set[bytes] = set()
    with multiprocessing.Pool(jobs) as pool:
        results = pool.imap(partial(_render, size=size), icons, chunksize=64)
        for icon, picture, reason in results:
            digest = hashlib.blake2b(picture, digest_size=16).digest()
            if not reason and digest in seen:
                reason = "duplicate pixels"
            if reason:
                dropped[reason] += 1
                continue
            seen.add(digest)
            yield icon, picture


def _render(icon: Icon, *, size: int) -> tuple[Icon, bytes, str]:
    """Returns the icon, its WebP bytes, and why it is unusable (empty if it is usable)."""
    try:
        # dpi: resvg's default of 0 rejects drawings that are sized in mm or pt.
        png = resvg_py.svg_to_bytes(svg_string=icon.svg, width=size, dpi=96, skip_system_fonts=True)
        picture = _on_white_square(Image.open(io.BytesIO(bytes(png))), size)
    except Exception as error:
        return icon, b"", f"error: {type(error).__name__}"
    if all(channel.getextrema()[0] == channel.getextrema()[1] for channel in picture.split()):
        return icon, b"", "blank"
    if picture.getcolors(MAX_COLOURS) is None:
        palette = picture.quantize(
            MAX_COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
        picture = palette.convert("RGB")
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", lossless=True, method=6)
    return icon, encoded.getvalue(), ""


def _on_white_square(drawing: Image.Image, size: int) -> Image.Image:
    drawing = drawing.convert("RGBA")
    if drawing.height > size:  # rendered to the width: tall drawings come out too large
        width = max(1, round(drawing.width * size / drawing.height))
        drawing = drawing.resize((width, size), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    corner = ((size - drawing.width) // 2, (size - drawing.height) // 2)
    square.paste(drawing, corner, drawing)
    return square
