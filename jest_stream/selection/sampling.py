"""Draws without replacement, in proportion to exp(logits), with noise that is named, not drawn.

Gumbel-top-k (Kool et al. 2019, https://arxiv.org/abs/1903.06059): add Gumbel noise to the logits
and take the k largest. It works on logarithms: nothing under- or overflows, and candidates of logit
-inf are never drawn. `torch.multinomial` returns such ones when the others run short (pytorch
#50034): where exp underflowed, 600 draws held all 100 examples that had been drawn before.

The noise is a hash of (key, step, chunk, position). A draw therefore does not depend on the
device, on how candidates are tiled or on how many ranks share them. Pure functions.

n: candidates; or examples of a draw, where the docstring says so.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from jest_stream.errors import ConfigError, NonFiniteError

_MASK = 2**64 - 1
# splitmix64 (Steele, Lea and Flood 2014): the golden ratio's increment and the two multipliers.
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# Halvings of a range of 60 octaves of gains: 2^-34 of an octave is left.
_BISECTIONS = 40


def gumbel_top_k(logits: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """Returns k distinct indices, drawn one after the other in proportion to exp(logits).

    Waits for the device, to see whether k candidates can be drawn at all.

    Args:
      logits: `[n]` unnormalised log-probabilities. -inf is never drawn. Not modified.
      k: examples to draw.
      generator: randomness, one number of which is consumed. None: fresh entropy from the
        operating system. The global random state is never touched.

    Returns:
      `[k]` int64, in draw order.

    Raises:
      NonFiniteError: if a logit is NaN or +inf.
      ConfigError: unless 0 <= k <= number of logits above -inf.
    """
    if logits.dim() != 1:
        raise ConfigError(f"logits must have one dimension, got shape {list(logits.shape)}")
    num_bad = int((logits.isnan() | logits.isposinf()).sum())
    if num_bad:
        raise NonFiniteError(
            f"{num_bad} of {len(logits)} logits are NaN or +inf, so there is no distribution to "
            f"draw from. Only -inf has a meaning: never drawn."
        )
    possible = int(logits.isfinite().sum())
    if not 0 <= k <= possible:
        raise ConfigError(
            f"k must be between 0 and the number of candidates that can be drawn, {possible} "
            f"({len(logits)} logits, {len(logits) - possible} of them -inf), got {k}: draws are "
            f"without replacement."
        )
    positions = torch.arange(len(logits), device=logits.device)
    noise = gumbel_noise(draw_key(generator), 0, 0, positions)
    return (logits.detach().double() + noise).topk(k).indices


def gumbel_noise(key: int, step: int, chunk: int, positions: Tensor) -> Tensor:
    """Returns one standard Gumbel variate per position: `[n]` float64, always finite.

    The same arguments give the same variates on every device.

    Args:
      key: names the run; from `draw_key` or any integer.
      step: number of the sub-batch in the run.
      chunk: number of the draw within the sub-batch.
      positions: `[n]` int64, the candidates' positions in the whole super-batch.
    """
    # The three names are folded into one state, and each position takes its number of splitmix64
    # from there. -log(-log(u)) of a uniform u is a Gumbel variate.
    state = 0
    for part in (key, step, chunk):
        state = _mix_integer((state + _INCREMENT) ^ (part & _MASK))
    bits = _mix(positions * _signed(_INCREMENT) + _signed(state))
    return _uniform(bits).log_().neg_().log_().neg_()


def draw_key(generator: torch.Generator | None = None) -> int:
    """Returns an integer in [0, 2^63) that names the noise of a run.

    Args:
      generator: one number of it is consumed; one on a GPU makes the host wait for that number.
        None: fresh entropy from the operating system.
    """
    if generator is None:
        return secrets.randbits(63)
    # The upper bound is exclusive, and 2^63 - 1 the largest that fits.
    number = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return int(number)


def effective_support(logits: Tensor) -> Tensor:
    """Returns among how many candidates a draw really chooses: `[]` float64, 1 / sum(p^2).

    Args:
      logits: `[n]`; p is their softmax. 1 is greedy, n uniform.
    """
    return logits.double().softmax(0).square().sum().reciprocal()


def gain_for_support(support: float, scores: Tensor) -> Tensor:
    """Returns the gain at which a draw really chooses among `support` candidates: `[]` float64.

    By bisection over gains that spread the scores by 2^-20 to 2^40 nats. Effective support only
    falls with the gain: the logarithm of sum(p^2) has the derivative 2 E[s] under p at twice the
    gain, less 2 E[s] under p. A support that no gain gives (more than all candidates, fewer than
    share the best score) is approached as closely as possible.

    Args:
      support: at least 1.
      scores: `[n]`, -inf for candidates that cannot be drawn.
    """
    below = scores.double() - scores.max()
    spread = -below.masked_fill(below.isneginf(), 0.0).min()  # of those that can be drawn
    unit = torch.where(spread > 0, spread, 1.0).reciprocal()
    low, high = torch.full_like(spread, -20.0), torch.full_like(spread, 40.0)
    for _ in range(_BISECTIONS):  # a constant number: a loop until convergence waits for the device
        middle = (low + high) / 2
        is_wide = effective_support(below * (unit * middle.exp2())) > support
        low, high = torch.where(is_wide, middle, low), torch.where(is_wide, high, middle)
    return unit * high.exp2()


def inclusion_probabilities(scores: Tensor, thresholds: Tensor, gain: Tensor | float) -> Tensor:
    """Returns how likely scores + noise / gain exceed their thresholds: `[n]` float64.

    With the key of an example's best substitute as its threshold this is the probability of its
    having been drawn, given all other keys: weighting by its inverse gives unbiased sums over all
    candidates (Kool et al. 2019, after the priority sampling of Duffield et al. 2007).
    n: examples of a draw.
    """
    if not isinstance(gain, Tensor) and math.isinf(gain):
        return torch.ones_like(thresholds)  # without noise the drawn were certain to be
    # P(Gumbel > x) = 1 - exp(-exp(-x)) at x = (threshold - score) * gain
    return -((scores - thresholds) * gain).exp_().neg_().expm1_()


def inverse_probability_weights(probabilities: Tensor) -> Tensor:
    """Returns weights of mean 1, in proportion to 1 / probability: `[n]` float64.

    The mean of anything under them estimates its mean over all candidates that the draw could have
    taken (a ratio estimate: consistent, with a bias of the order of 1 / n). n: examples of a draw.

    Args:
      probabilities: `[n]`, from `inclusion_probabilities`.
    """
    weights = probabilities.reciprocal()
    return weights / weights.mean()


def chunk_sizes(batch_size: int, num_chunks: int) -> list[int]:
    """Returns how many examples each chunk draws; a remainder goes to the first chunks.

    For example, 10 in 4 chunks are [3, 3, 2, 2]. Never more chunks than examples: 7 in 16 chunks
    are seven of 1, because every chunk draws at least one.
    """
    num_chunks = min(num_chunks, batch_size)
    size, remainder = divmod(batch_size, num_chunks)
    return [size + (chunk < remainder) for chunk in range(num_chunks)]


def uniform_sizes(sizes: Sequence[int], fraction: float) -> list[int]:
    """Returns how many examples of each chunk are drawn uniformly.

    After each chunk the fraction of all examples so far, rounded: a tenth of [3, 3, 2, 2] makes
    totals of .3, .6, .8 and 1, rounded 0, 1, 1, 1; their differences are [0, 1, 0, 0].
    """
    totals = [math.floor(end * fraction + 0.5) for end in accumulate(sizes)]
    return [total - before for before, total in pairwise([0, *totals])]


def scaled_logits(scores: Tensor, gain: Tensor | float) -> Tensor:
    """Returns gain * scores up to a constant: `[n]` float64, the largest 0. The gain may be inf."""
    below = scores.double() - scores.max()
    is_infinite = not isinstance(gain, Tensor) and math.isinf(gain)
    # 0 * inf is NaN: the best scores stay at 0, all others fall to -inf.
    return (below * gain).masked_fill(below == 0, 0.0) if is_infinite else below * gain


def _uniform(bits: Tensor) -> Tensor:
    """Returns a number strictly inside (0, 1) for each int64: no logarithm is infinite.

    52 bits and a half just fit a float64: with one more, the largest would round to 1. (Float32
    has room for 23: keys would tie, and the largest noise be 16.6.)
    """
    return (_shift_right(bits, 12).double() + 0.5).mul_(2.0**-52)


def _mix(state: Tensor) -> Tensor:
    """Returns splitmix64's finaliser of each int64; products wrap around."""
    state = (state ^ _shift_right(state, 30)) * _signed(_MULTIPLIERS[0])
    state = (state ^ _shift_right(state, 27)) * _signed(_MULTIPLIERS[1])
    return state ^ _shift_right(state, 31)


def _mix_integer(state: int) -> int:
    """Returns the same of one Python integer, in [0, 2^64)."""
    state &= _MASK
    state = (state ^ (state >> 30)) * _MULTIPLIERS[0] & _MASK
    state = (state ^ (state >> 27)) * _MULTIPLIERS[1] & _MASK
    return state ^ (state >> 31)


def _shift_right(state: Tensor, bits: int) -> Tensor:
    """Returns a logical shift: torch's own copies the sign in from the left."""
    return state.bitwise_right_shift(bits).bitwise_and(2 ** (64 - bits) - 1)


def _signed(number: int) -> int:
    """Returns the int64 with the bits of a number in [0, 2^64)."""
    return number - 2**64 if number >= 2**63 else number
