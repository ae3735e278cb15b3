"""Gives the pictures that ship with the package as tar shards and as tensors.

`icons.parquet` holds 43,000 icons and emoji at 32 px with their names: a pool to train on, and
five more sets to test on. `ATTRIBUTION.md` beside it names the authors and licences;
`examples/icons` builds it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from jest_stream.demo.model import IMAGE_SIZE, HashTokenizer, TwoTowerModel
from jest_stream.errors import ConfigError

ASSETS = Path(__file__).parent / "assets"
TARGET = "fluent-emoji-flat"
"""The held-out set of the reference's domain: emoji, by a vendor that is in no training set."""
NUM_SHARDS = 32
"""More shards than lanes even for small batches: neighbours in a batch come from afar."""

_LAYOUT = 2  # of the unpacked shards; part of the folder's name
_MAX_SHIFT = 2


@dataclass(frozen=True)
class Pairs:
    """Matching pictures and captions, ready for the model."""

    images: Tensor
    """`[n, 3, 32, 32]` uint8."""
    tokens: Tensor
    """`[n, L]` int64."""


def unpack(cache_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """Returns the paths of the pool's tar shards, writing them at the first call.

    The folder is named by a hash of the pictures and appears whole, by renaming, also when two runs
    unpack at once.

    Args:
      cache_dir: folder to keep them in. Default: `jest_stream` in the user's cache folder.

    Raises:
      ConfigError: if the folder cannot be written.
    """
    parquet = ASSETS / "icons.parquet"
    digest = hashlib.blake2b(parquet.read_bytes(), digest_size=6).hexdigest()
    root = Path(cache_dir) if cache_dir is not None else _user_cache()
    folder = root / f"icons-v{_LAYOUT}-{digest}"
    if not folder.is_dir():
        try:
            _unpack_into(folder)
        except OSError as error:
            raise ConfigError(
                f"the demo's pictures cannot be unpacked into {root}: {error}. They take 140 MB; "
                f"set XDG_CACHE_HOME to a folder that can be written."
            ) from error
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def evaluation_sets() -> dict[str, Pairs]:
    """Returns the held-out sets by name, the reference's domain (`TARGET`) first."""
    rows: dict[str, list[dict[str, Any]]] = {TARGET: []}
    for row in _rows(("target", "general")):
        rows.setdefault(row["set"], []).append(row)
    tokenizer = HashTokenizer()
    return {name: _pairs(found, tokenizer) for name, found in rows.items()}


def read_pairs(path: str | os.PathLike[str]) -> Pairs:
    """Returns all pairs of a Parquet file with the columns `image` and `text`."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=["image", "text"])
    return _pairs(table.to_pylist(), HashTokenizer())


def load_reference() -> TwoTowerModel:
    """Returns the model that defines learnability: trained on emoji, at half resolution."""
    from safetensors.torch import load_file

    weights = load_file(ASSETS / "reference.safetensors")
    with torch.device("meta"):  # draws no initial weights: the caller's random state stays
        model = TwoTowerModel()
    state = {name: weight.float() for name, weight in weights.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def full_view(image: Image.Image) -> Tensor:
    """Returns `[3, 32, 32]` uint8 pixels."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def half_view(image: Image.Image) -> Tensor:
    """Returns `[3, 16, 16]` uint8 pixels: the cheap view that candidates are scored on."""
    return full_view(image.reduce(2))


def shifted_view(image: Image.Image) -> Tensor:
    """Returns `[3, 32, 32]` uint8 pixels, moved at random: the view that is trained on."""
    pixels = np.pad(np.array(image), ((_MAX_SHIFT,) * 2, (_MAX_SHIFT,) * 2, (0, 0)), mode="edge")
    top, left = torch.randint(2 * _MAX_SHIFT + 1, (2,)).tolist()
    moved = pixels[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
    return torch.from_numpy(np.ascontiguousarray(moved)).permute(2, 0, 1)


def _rows(roles: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(ASSETS / "icons.parquet", filters=[("role", "in", roles)])
    for batch in table.to_batches():
        yield from batch.to_pylist()


def _pairs(rows: list[dict[str, Any]], tokenizer: HashTokenizer) -> Pairs:
    images = [full_view(Image.open(io.BytesIO(row["image"])).convert("RGB")) for row in rows]
    return Pairs(torch.stack(images), tokenizer([row["text"] for row in rows]))


def _user_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "jest_stream"


def _unpack_into(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        _write_shards(partial)
        partial.chmod(0o755)  # mkdtemp makes folders for this user alone
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(folder: Path) -> None:
    """Deals the pool out to shards; its rows are in shuffled order already.

    Two runs write the same bytes: all members have one date.
    """
    from webdataset import TarWriter

    rows = list(_rows(("pool",)))
    for shard in range(NUM_SHARDS):
        path = folder / f"icons-{shard:03d}.tar"
        with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False) as archive:
            for row in rows[shard::NUM_SHARDS]:
                about = {name: row[name] for name in ("set", "family", "category", "licence")}
                archive.write(
                    {
                        "__key__": row["key"],
                        "webp": row["image"],
                        "txt": row["text"].encode(),
                        "json": json.dumps(about).encode(),
                    }
                )
