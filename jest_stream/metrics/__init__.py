"""Counts a run: counters, last values and times go in, one flat dict and a cost come out.

    metrics.py     counters, last values, times
    accounting.py  rows that models took, counted and priced in FLOPs
    flops.py       FLOPs of a pass and of a step; the cost formula
    run_cost.py    the cost of a run, and the steps that selection must save to pay

Fed by the training thread.
"""

from jest_stream.metrics.accounting import ForwardPass, Model
from jest_stream.metrics.flops import training_flops
from jest_stream.metrics.metrics import Metrics, shared_out
from jest_stream.metrics.run_cost import RunCost

__all__ = ["ForwardPass", "Metrics", "Model", "RunCost", "shared_out", "training_flops"]
