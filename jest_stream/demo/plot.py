"""Plots accuracy against steps, FLOPs and wall time, one row per domain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jest_stream.demo.comparison import COSTS, Curve

COLOURS = {"uniform": "#7f7f7f", "JEST": "#d1495b"}
_UNITS = {"FLOPs": ("TFLOP", 1e-12), "wall time": ("seconds", 1.0)}


def save_plot(curves: Mapping[str, Curve], path: Path, *, title: str) -> None:
    """Writes a PNG. Uses no display and leaves pyplot's state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains = list(next(iter(curves.values()))[0].accuracy)
    figure = Figure(figsize=(10, 2.9 * len(domains)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(domains), len(COSTS), sharey="row", squeeze=False)
    for row, domain in zip(axes, domains, strict=True):
        for axis, (name, cost) in zip(row, COSTS.items(), strict=True):
            unit, factor = _UNITS.get(name, (name, 1.0))
            for run, curve in curves.items():
                costs = [cost(at) * factor for at in curve]
                recalls = [at.accuracy[domain].at_5 for at in curve]
                axis.plot(costs, recalls, label=run, color=COLOURS.get(run), marker=".")
            axis.set_xlabel(unit)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{domain}: R@5 in %")
    axes[0][0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
