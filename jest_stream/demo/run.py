"""Trains the same model on the same pictures twice: with uniform batches and with JEST.

Both read the same shards and train on as many pairs per step; the JEST run chooses them from more
candidates. The runs take turns, in the calling thread. Writes `summary.md`, `curves.png` and
`results.json`.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jest_stream.config import Method, SelectionConfig
from jest_stream.dataset import JESTDataset
from jest_stream.demo import data
from jest_stream.demo.comparison import Curve, CurvePoint, compare, table, verdict
from jest_stream.demo.data import Pairs
from jest_stream.demo.model import HashTokenizer, TwoTowerModel
from jest_stream.demo.plot import save_plot
from jest_stream.demo.training import Point, train
from jest_stream.errors import ConfigError
from jest_stream.metrics import RunCost, training_flops
from jest_stream.randomness import isolated_rng

DEFAULT_STEPS = 400
BATCH_SIZE = 256
TESTS_PER_RUN = 16
METHODS: dict[str, Method] = {"uniform": "uniform", "JEST": "joint"}


def run_demo(
    steps: int | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] = "jest_demo",
    device: str = "cpu",
    filter_ratio: float = 0.8,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Returns the content of `results.json`: settings, curves and the verdict.

    Args:
      steps: training steps of each run. Default: 400.
      seed: of the model, the order of examples and the choice.
      out: folder for the results, made if need be.
      device: where to train and score.
      filter_ratio: share of the candidates that JEST drops.
      cache_dir: folder to unpack the pictures in. Default: the user's cache folder.

    Raises:
      ConfigError: for settings that cannot work.
    """
    steps = DEFAULT_STEPS if steps is None else steps
    folder = _checked(steps, device, Path(out))
    print(
        "Preparing the pictures; the first time they are unpacked into a cache folder.", flush=True
    )
    shards = data.unpack(cache_dir)
    sets = data.evaluation_sets()
    with isolated_rng("demo model", seed):
        initial = TwoTowerModel().to(device)
    price = price_of_training(initial, sets[data.TARGET])
    with _shared_cores(device) as num_workers, ExitStack() as stack:
        runs = []
        for name, method in METHODS.items():
            model = copy.deepcopy(initial)
            dataset = JESTDataset(
                shards,
                learner=model,
                reference=None if method == "uniform" else data.load_reference(),
                transform=data.half_view,
                train_transform=data.shifted_view,
                tokenizer=HashTokenizer(),
                batch_size=BATCH_SIZE,
                filter_ratio=filter_ratio,
                selection=SelectionConfig(method=method),
                seed=seed,
                num_workers=num_workers,
                training_flops=price,
            )
            stack.enter_context(dataset)
            runs.append(_Run(name, model, dataset, sets, steps=steps))
            stack.callback(runs[-1].close)
        _alternate(runs)
    curves = {run.name: run.curve for run in runs}
    settings = {"steps": steps, "seed": seed, "filter_ratio": filter_ratio, **_machine(device)}
    return _write(folder, settings, curves, sets)


def price_of_training(model: TwoTowerModel, pairs: Pairs) -> float:
    """Returns the FLOPs of a training step per example, counted on a batch."""
    images = pairs.images[:BATCH_SIZE].to(model.logit_scale.device)
    tokens = pairs.tokens[:BATCH_SIZE].to(images.device)
    return training_flops(model, lambda copied: copied(images, tokens)) / len(tokens)


class _Run:
    """One training run: its stream, its progress bar and the points of its curve."""

    def __init__(
        self,
        name: str,
        model: TwoTowerModel,
        dataset: JESTDataset,
        sets: Mapping[str, Pairs],
        *,
        steps: int,
    ) -> None:
        from tqdm import tqdm

        self.name = name
        self.curve: list[CurvePoint] = []
        self._dataset = dataset
        test_every = max(1, steps // TESTS_PER_RUN)
        self._training = train(model, dataset, sets, steps=steps, test_every=test_every)
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=steps, desc=f"{name:>7}", unit="step", disable=not is_terminal)

    def advance(self) -> bool:
        """Trains up to the next test; returns False if there is none left."""
        for step, point in self._training:
            self._bar.update(min(step, 1))
            if point is not None:
                self._note(point)
                return True
        return False

    def close(self) -> None:
        """Leaves the progress bar as it is on the screen."""
        self._bar.close()

    def _note(self, point: Point) -> None:
        self.curve.append(_curve_point(point, self._dataset.cost()))
        news = f"R@5 emoji {point.target.at_5:.1f} %, others {point.others.at_5:.1f} %"
        self._bar.set_postfix_str(news)
        if self._bar.disable:
            print(f"{self.name}: step {point.step}, {point.seconds:.0f} s, {news}", flush=True)


def _alternate(runs: list[_Run]) -> None:
    """Advances the runs by turns, from test to test."""
    # One after the other, a machine that slows down meanwhile (heat, other work) would make the
    # second run look slow.
    while runs:
        runs = [run for run in runs if run.advance()]


def _curve_point(point: Point, cost: RunCost) -> CurvePoint:
    return CurvePoint(
        steps=point.step,
        scored=cost.samples_scored,
        trained=cost.samples_trained,
        flops=cost.flops.total,
        seconds=point.seconds,
        accuracy={"emoji": point.target, "others": point.others},
    )


def _write(
    folder: Path, settings: dict[str, Any], curves: Mapping[str, Curve], sets: Mapping[str, Pairs]
) -> dict[str, Any]:
    """Prints the outcome and writes it down."""
    uniform, jest = curves["uniform"], curves["JEST"]
    num_emoji = len(sets[data.TARGET].images)
    num_others = sum(len(pairs.images) for pairs in sets.values()) - num_emoji
    comparison = table(compare(uniform, jest))
    sentences = verdict(uniform, jest, {"emoji": num_emoji, "others": num_others})
    results = {
        "settings": settings,
        "verdict": sentences,
        "curves": {name: [asdict(at) for at in curve] for name, curve in curves.items()},
    }
    title = "{steps} steps, seed {seed}, filter ratio {filter_ratio}".format(**settings)
    save_plot(curves, folder / "curves.png", title=title)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    summary = "\n\n".join([comparison, *sentences])
    (folder / "summary.md").write_text(f"# {title}\n\n{summary}\n", encoding="utf-8")
    print(f"\n{summary}\n\nWritten to {folder}: summary.md, curves.png, results.json")
    return results


def _checked(steps: int, device: str, folder: Path) -> Path:
    """Returns the output folder, made, once the settings can work."""
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but this machine has no usable GPU. Use 'cpu'.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={str(folder)!r} cannot be made a folder: {error}") from error
    return folder


@contextmanager
def _shared_cores(device: str) -> Iterator[int]:
    """Yields the number of processes that should read; torch gets the other cores meanwhile."""
    # More threads than cores make both slow: three on two cores halve the speed.
    cores = os.cpu_count() or 1
    num_workers = max(1, min(4, cores // 2))
    num_threads = torch.get_num_threads()
    # With 8 cores 4 processes read and torch gets 4 threads; with 2 cores, 1 and 1.
    if device == "cpu":
        torch.set_num_threads(max(1, cores - num_workers))
    try:
        yield num_workers
    finally:
        torch.set_num_threads(num_threads)


def _machine(device: str) -> dict[str, Any]:
    is_cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else device,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
