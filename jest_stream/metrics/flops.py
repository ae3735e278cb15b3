"""Measures the FLOPs of training and scoring once per model, and multiplies them.

A multiply-add counts as 2. Counted are matrix products and convolutions, attention included, as
the mathematics has it: a fused kernel that computes something twice is not charged for it.
Norms, softmax and other elementwise work count nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from jest_stream.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def forward_flops(function: Callable[..., object], *args: object) -> int:
    """Returns the FLOPs of one call `function(*args)`, without gradients.

    Divide by the rows in `args` for FLOPs per example. Parameters and random state are as
    before afterwards; a module in train mode would update its running statistics, so count in
    eval mode. Work that the function does in other threads is not seen.
    """
    with _counter() as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops()


def training_flops(module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Returns the FLOPs of one forward and backward pass, without the optimizer's.

    Args:
      module: the model being trained. A copy in train mode does the work: gradients and running
        statistics of `module` stay.
      loss: computes the scalar to differentiate, given that copy.
    """
    with _counter() as counter, torch.enable_grad():
        torch.autograd.backward(loss(copy.deepcopy(module).train()))
    return counter.get_total_flops()


@contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    """Counts the FLOPs of the block, makes torch compute visibly, and puts everything back.

    A plain `FlopCounterMode` fails in four ways, each mended below:

    1. `nn.TransformerEncoder` and `nn.MultiheadAttention` count 0 in eval mode: their fast path is
       one operator.
    2. Fused attention counts by the kernel that the device happens to have: nothing for some, five
       products backwards instead of four for others.
    3. Where the caller is in inference_mode, nothing can be trained.
    4. It hooks all modules of the process, see `_OneModule`.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # takes half a second to import

    has_fast_path = torch.backends.mha.get_fastpath_enabled()
    has_cuda_state = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = [torch.cuda.current_device()] if has_cuda_state else []
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _OneModule()  # type: ignore[assignment]
    try:
        with (
            torch.inference_mode(False),
            torch.random.fork_rng(devices=devices),
            sdpa_kernel(SDPBackend.MATH),
            counter,
        ):
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(has_fast_path)


class _OneModule:
    """Takes the place of the tracker that tells the counter in which module it is.

    That would hook all modules of the process for the while, which slows compiled ones for good
    (pytorch #140909), and fails without gradients where a module is given a view of a parameter, as
    timm's attention pool does.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of a training step or of a whole run, by purpose."""

    training: float
    """The user's steps on the sub-batches."""
    learner_scoring: float
    """The learner copy's passes over the super-batches."""
    reference_scoring: float
    """The reference's passes over the super-batches; 0 if its embeddings are cached."""
    selection: float
    """Pair logits of the chosen with all candidates, of each model that counts."""
    reusable: float = 0.0
    """Part of `learner_scoring`: forward passes of the chosen at the size they are trained at. A
    loader that scores with a copy pays them again in training; the paper counts them once: 233 %
    of a uniform step at f = 0.8 in its Table 1, not 267 %."""
    spared: float = 0.0
    """Paid by uniform training on top of `training`: where a part of each sub-batch is trained at
    the score size, the rest of the full price of that part."""

    @property
    def total(self) -> float:
        """Everything together."""
        return self.training + self.learner_scoring + self.reference_scoring + self.selection

    @property
    def uniform(self) -> float:
        """Uniform training on as many examples, all of them at full size."""
        return self.training + self.spared

    @property
    def ratio(self) -> float:
        """All that was paid over the cost of uniform training."""
        return self.total / self.uniform if self.training else math.nan

    @property
    def ratio_with_reuse(self) -> float:
        """The same as the paper counts it: without the reusable forward passes."""
        return (self.total - self.reusable) / self.uniform if self.training else math.nan


def cost_ratio(
    filter_ratio: float,
    *,
    score: float = 1.0,
    reference: float = 1.0,
    training: float = 1.0,
    reuse: float = 0.0,
) -> float:
    """Returns the cost of a JEST step over that of a uniform step of equal batch size.

    A rule of thumb in which training costs 3 forward passes and selection itself nothing; it is
    also the iteration speed-up at which JEST breaks even. It gives the paper's Table 1: at f = 0.8
    with a cached reference and reuse 2.33, for Flexi-JEST (cached, 0.28 and 0.64) 1.11.

    Args:
      filter_ratio: fraction discarded, in [0, 1).
      score: cost of the learner's scoring pass, in full forward passes; 0.28 at patch 32
        instead of 16 in Flexi-JEST, 0 for easy_reference.
      reference: cost of the reference's pass likewise; 0 if cached.
      training: cost of the training step over a plain one; 0.64 for half of it at patch 32.
      reuse: 1 if the scoring pass of the chosen serves training too, as in the paper.
    """
    # In forward passes: b / (1 - f) rows are scored for b that are trained on.
    if not 0 <= filter_ratio < 1:
        raise ConfigError(f"filter_ratio must be in [0, 1), got {filter_ratio}")
    return ((score + reference) / (1 - filter_ratio) + 3 * training - reuse) / 3
