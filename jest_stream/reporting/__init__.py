"""What the stream did: counters, gauges and times, and what they cost in FLOPs."""

from jest_stream.reporting.accounting import Accounting, Model, Pass
from jest_stream.reporting.compute import (
    Flops,
    cost_ratio,
    forward_flops,
    training_flops,
)
from jest_stream.reporting.cost import RunCost
from jest_stream.reporting.metrics import Metrics

__all__ = [
    "Accounting",
    "Flops",
    "Metrics",
    "Model",
    "Pass",
    "RunCost",
    "cost_ratio",
    "forward_flops",
    "training_flops",
]
