"""What the stream did: counters, gauges and times, and what they cost in FLOPs."""

from jest_stream.metrics.accounting import Accounting, Model, Pass
from jest_stream.metrics.compute import Flops, cost_ratio, forward_flops, training_flops
from jest_stream.metrics.cost import RunCost
from jest_stream.metrics.metrics import Metrics, shared_out

__all__ = [
    "Accounting",
    "Flops",
    "Metrics",
    "Model",
    "Pass",
    "RunCost",
    "cost_ratio",
    "forward_flops",
    "shared_out",
    "training_flops",
]
