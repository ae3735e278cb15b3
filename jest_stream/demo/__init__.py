"""Runs the demo: real icons and emoji that ship with the package, a small model, a comparison.

`data` unpacks the pictures into tar shards; `model` and `training` are a user's own code; `run`
trains with uniform batches and with JEST; `comparison` and `plot` report the outcome.
"""

from jest_stream.demo.run import run_demo

__all__ = ["run_demo"]
