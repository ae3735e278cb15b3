"""Makes fingerprints of a model and its views: a hash of the weights, and outputs for fixed probes.

A transform or tokenizer may be any function, of which only outputs can be compared: here those for
a few pictures of different sizes and a few texts, sampled. Numbers are compared with a small
tolerance, since libraries round differently from version to version. Pure functions.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jest_stream.config import Transform
from jest_stream.errors import ConfigError
from jest_stream.randomness import isolated_rng
from jest_stream.scoring import unwrap
from jest_stream.views import Row, add_view

ViewFingerprint = list[dict[str, Any]]
"""Per probe its `probe` name and `outputs`: name, shape, dtype and sampled values of each tensor;
or the `error` that it raised. Empty without a view: the values are tensors already."""

# Wide and high, square, large, and one with odd sides: resizing and cropping differ by them.
_SIZES = ((64, 48), (48, 80), (224, 224), (500, 375), (37, 211))
_TEXTS = (
    "a photo of a cat",
    "Zwei naïve Füchse, 漢字 and an emoji 🙂",
    "UPPER lower 1234567890 &amp; <tag> 'quote' \"double\"\ttab",
    "one caption that is longer than most models take " * 12,
    "",
)
_NUM_VALUES = 256  # sampled of each tensor of floats,
_NUM_INTEGERS = 512  # and of each tensor of integers
_TOLERANCE = 5e-3  # absolute, of values that are a few units large after Normalize
_PASSIVE = (nn.Identity, nn.Dropout)  # releases put one or the other in the same place


def weights_fingerprint(module: nn.Module) -> str:
    """Returns a hash of names, shapes, dtypes and bytes of all weights of a module.

    The kinds of its layers without weights are hashed too: one set of weights gives other
    embeddings with GELU than with QuickGELU. Wrappers are looked through. Tensors are copied to
    the CPU one by one.
    """
    digest = hashlib.blake2b(digest_size=16)
    inner = unwrap(module)
    for layer in inner.modules():
        content = [*layer.children(), *layer.parameters(), *layer.buffers()]
        if not content and not isinstance(layer, _PASSIVE):
            digest.update(f"{type(layer).__name__}\n".encode())
    for name, tensor in sorted(inner.state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue  # extra state, which a module may keep in any form
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{list(plain.shape)}|{plain.dtype}\n".encode())
        if plain.numel():
            digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def transform_fingerprint(transform: Transform | None) -> ViewFingerprint:
    """Returns a transform's outputs for fixed pictures, one with a palette among them.

    Raises:
      ConfigError: if it draws at random.
    """
    from PIL import Image

    probes: dict[str, Any] = {}
    for width, height in _SIZES:
        probes[f"image of {width} x {height}"] = Image.fromarray(_picture(width, height))
    palette = Image.fromarray(_picture(96, 64)).quantize(16).convert("RGB")
    probes["image with a palette"] = palette
    return _fingerprint(transform, probes, "image")


def tokenizer_fingerprint(tokenizer: Transform | None) -> ViewFingerprint:
    """Returns a tokenizer's outputs for fixed texts: long, empty, in several scripts.

    Raises:
      ConfigError: if it draws at random.
    """
    return _fingerprint(tokenizer, {f"text {text[:24]!r}": text for text in _TEXTS}, "text")


def view_difference(cached: ViewFingerprint, found: ViewFingerprint) -> str:
    """Returns in words how two views differ, by the first probe where they do; empty if nowhere."""
    # An empty fingerprint stands for no view at all.
    if bool(cached) != bool(found):
        one, other = ("a function", "none") if cached else ("none", "a function")
        return f"the cache was built with {one}, here is {other}"
    for before, now in zip(cached, found, strict=False):
        probe = before["probe"]
        if before.get("error") != now.get("error"):
            return f"for the {probe} it was {_outcome(before)}, is {_outcome(now)}"
        for first, second in zip(before["outputs"], now["outputs"], strict=False):
            if difference := _output_difference(first, second):
                return f"for the {probe} {difference}"
        if len(before["outputs"]) != len(now["outputs"]):
            return f"for the {probe} it was {_outcome(before)}, is {_outcome(now)}"
    return "" if len(cached) == len(found) else "they were compared on other probes"


def _fingerprint(view: Transform | None, probes: dict[str, Any], kind: str) -> ViewFingerprint:
    if view is None:
        return []
    found: ViewFingerprint = []
    for name, probe in probes.items():
        # Under two random states: a view that draws at random gives two outputs.
        outputs = [_outputs(view, probe, kind, seed) for seed in (1, 2)]
        if outputs[0] != outputs[1]:
            role = "transform" if kind == "image" else "tokenizer"
            raise ConfigError(
                f"the {role} of the reference gives something else each time (for the {name}, "
                f"say): embeddings of a random view cannot be cached. Pass a deterministic "
                f"{role}, such as open_clip's preprocess_val."
            )
        found.append({"probe": name, **outputs[0]})
    return found


def _outputs(view: Transform, probe: Any, kind: str, seed: int) -> dict[str, Any]:
    row: Row = {"key": "of a probe"}
    with isolated_rng("probe", seed):
        try:
            add_view(row, kind, view(probe.copy() if kind == "image" else probe))
        except Exception as error:  # a view may refuse an empty text or a size: that tells, too
            return {"outputs": [], "error": type(error).__name__}
    outputs = [_sampled(name, value) for name, value in sorted(row.items()) if name != "key"]
    return {"outputs": outputs}


def _sampled(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {"name": name, "shape": [], "dtype": type(value).__name__, "values": [str(value)]}
    flat = value.detach().cpu().flatten()
    most = _NUM_VALUES if flat.is_floating_point() else _NUM_INTEGERS
    # Evenly over the tensor, ends included; 6 digits, which JSON gives back unchanged.
    at = torch.linspace(0, max(len(flat) - 1, 0), min(most, len(flat))).long()
    values = [float(f"{number:.6g}") for number in flat[at].double().tolist()]
    return {
        "name": name,
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "values": values,
    }


def _output_difference(cached: dict[str, Any], found: dict[str, Any]) -> str:
    for field in ("name", "shape", "dtype"):
        if cached[field] != found[field]:
            return f"the {field} was {cached[field]}, is {found[field]}"
    is_float = cached["dtype"].startswith(("float", "bfloat"))
    for before, now in zip(cached["values"], found["values"], strict=True):
        if before == now or (is_float and _are_near(before, now)):
            continue
        shown = [value if isinstance(value, str) else f"{value:g}" for value in (before, now)]
        return f"a value of {cached['name']} was {shown[0]}, is {shown[1]}"
    return ""


def _are_near(one: float, other: float) -> bool:
    are_nan = math.isnan(one) and math.isnan(other)
    return are_nan or math.isclose(one, other, abs_tol=_TOLERANCE)


def _outcome(probe: dict[str, Any]) -> str:
    if "error" in probe:
        return f"a {probe['error']}"
    return ", ".join(f"{out['name']} {out['shape']}" for out in probe["outputs"]) or "nothing"


def _picture(width: int, height: int) -> Any:
    """Returns `[height, width, 3]` uint8: a ramp, tiles and fine detail, none of them symmetric."""
    y, x = np.mgrid[0:height, 0:width]
    ramp = (x * 160 // max(width - 1, 1) + y * 95 // max(height - 1, 1)) % 256
    tiles = (x // 5 + 2 * (y // 7)) % 3 * 127
    detail = (x * x * 7 + y * 13 + x * y) % 256
    return np.stack([ramp, tiles, detail], axis=-1).astype(np.uint8)
