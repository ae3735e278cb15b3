"""What the stream did: counters, gauges and times, and what they cost in FLOPs."""

from jest_stream.reporting.compute import (
    StepFlops,
    cost_ratio,
    forward_flops,
    step_flops,
    training_flops,
)
from jest_stream.reporting.metrics import Metrics

__all__ = [
    "Metrics",
    "StepFlops",
    "cost_ratio",
    "forward_flops",
    "step_flops",
    "training_flops",
]
