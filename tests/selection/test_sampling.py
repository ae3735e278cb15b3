"""Draws are distinct, follow the closed-form probabilities and depend on named noise alone.

pytest tests/selection/test_sampling.py
"""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch

from jest_stream.errors import ConfigError, NonFiniteError
from jest_stream.selection.sampling import (
    _uniform,
    chunk_sizes,
    draw_key,
    effective_support,
    gumbel_noise,
    gumbel_top_k,
    scaled_logits,
)


def _splitmix_gumbel_bits(key: int, step: int, chunk: int, position: int) -> int:
    """The hash in Python's integers, which neither wrap nor have a sign."""
    modulus = 2**64

    def mix(state: int) -> int:
        state %= modulus
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % modulus
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % modulus
        return state ^ (state >> 31)

    state = 0
    for part in (key, step, chunk):
        state = mix((state + 0x9E3779B97F4A7C15) ^ (part % modulus))
    return mix(position * 0x9E3779B97F4A7C15 + state)


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, -5])
def test_the_noise_is_the_hash_worked_out_in_plain_integers(key):
    positions = torch.tensor([0, 1, 2, 163_839, 2**40])
    noise = gumbel_noise(key, 7, 15, positions)
    for position, value in zip(positions.tolist(), noise.tolist(), strict=True):
        uniform = ((_splitmix_gumbel_bits(key, 7, 15, position) >> 12) + 0.5) / 2**52
        assert value == pytest.approx(-np.log(-np.log(uniform)), rel=1e-12)


def test_noise_of_a_position_does_not_depend_on_the_positions_beside_it():
    whole = gumbel_noise(3, 1, 4, torch.arange(1000))
    assert torch.equal(gumbel_noise(3, 1, 4, torch.arange(500, 1000)), whole[500:])


def test_the_most_extreme_bits_give_finite_noise():
    bits = torch.tensor([0, -1, 2**63 - 1, -(2**63)])  # all clear, all set, and both halves
    uniform = _uniform(bits)
    assert ((uniform > 0) & (uniform < 1)).all()
    assert uniform.log().neg().log().isfinite().all()


def test_noise_has_the_gumbel_distribution():
    # By Dvoretzky, Kiefer and Wolfowitz the distance exceeds this with probability 1e-9.
    n = 2**20
    bound = np.sqrt(np.log(2 / 1e-9) / (2 * n))
    uniform = gumbel_noise(0, 0, 0, torch.arange(n)).neg().exp().neg().exp().sort().values
    steps = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum((uniform - steps).abs(), (uniform - steps - 1 / n).abs()).max()
    assert distance < bound


def test_noises_of_other_keys_steps_chunks_and_positions_are_uncorrelated():
    # Each correlation is normal with deviation 1/sqrt(n): beyond 6 with probability 2e-9.
    n = 2**18
    positions = torch.arange(n)
    base = gumbel_noise(10, 20, 30, positions)
    others = {
        "key": gumbel_noise(11, 20, 30, positions),
        "step": gumbel_noise(10, 21, 30, positions),
        "chunk": gumbel_noise(10, 20, 31, positions),
        "position": gumbel_noise(10, 20, 30, positions + 1),
        "swapped": gumbel_noise(20, 10, 30, positions),
    }
    for name, other in others.items():
        correlation = torch.corrcoef(torch.stack((base, other)))[0, 1]
        assert abs(correlation) < 6 / n**0.5, name


def test_ordered_draws_have_their_closed_form_probabilities():
    # P(i, then j) = p_i p_j / (1 - p_i). Chi-square with 11 degrees of freedom is above 50 with
    # probability 6e-7.
    weights = [0.5, 0.3, 0.15, 0.05]
    logits = torch.tensor(weights).log() + 3  # the constant must not matter
    generator = torch.Generator().manual_seed(0)
    num_draws = 6000
    counts = Counter(tuple(gumbel_top_k(logits, 2, generator).tolist()) for _ in range(num_draws))
    statistic = 0.0
    for i, j in itertools.permutations(range(4), 2):
        expected = num_draws * weights[i] * weights[j] / (1 - weights[i])
        statistic += (counts[i, j] - expected) ** 2 / expected
    assert sum(counts.values()) == num_draws
    assert statistic < 50


def test_inclusion_follows_the_closed_form_at_larger_sizes():
    # With equal logits each of 200 is among 50 draws with probability 1/4; over 2000 draws the
    # count is within 6.5 deviations of 500, all 200 of them but with probability 2e-8.
    counts = torch.zeros(200)
    for key in range(2000):
        counts[gumbel_noise(key, 0, 0, torch.arange(200)).topk(50).indices] += 1
    assert (counts - 500).abs().max() < 6.5 * (2000 * 0.25 * 0.75) ** 0.5


def test_what_has_logit_minus_infinity_is_never_drawn():
    # exp(-2000) underflows: torch.multinomial would fill up with impossible candidates here.
    logits = torch.full((300,), -torch.inf)
    logits[100:] = -2000.0 - torch.arange(200)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        drawn = gumbel_top_k(logits, 200, generator)
        assert drawn.min() >= 100 and drawn.unique().numel() == 200


def test_huge_logits_overflow_nothing():
    logits = torch.tensor([1e30, 1e4, 3e38, -1e38])
    assert gumbel_top_k(logits, 4, torch.Generator().manual_seed(0)).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_type_of_logits_draws_alike(dtype):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = gumbel_top_k(logits, 20, torch.Generator().manual_seed(5))
    expected = gumbel_top_k(logits.double(), 20, torch.Generator().manual_seed(5))
    assert torch.equal(drawn, expected)


def test_one_generator_gives_the_same_draws_again_and_then_others():
    logits = torch.zeros(100)
    first, second = (torch.Generator().manual_seed(2) for _ in range(2))
    assert torch.equal(gumbel_top_k(logits, 50, first), gumbel_top_k(logits, 50, second))
    again = gumbel_top_k(logits, 50, first)
    assert not torch.equal(again, gumbel_top_k(logits, 50, torch.Generator().manual_seed(2)))


def test_without_a_generator_draws_differ_and_global_random_state_stays():
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    # Equal by chance once in 1000! draws.
    draws = [gumbel_top_k(torch.zeros(1000), 1000) for _ in range(2)]
    assert not torch.equal(*draws)
    assert draw_key() != draw_key()  # false alarm: 2^-63
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_drawing_all_returns_a_permutation_and_drawing_none_nothing():
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert gumbel_top_k(logits, 64).sort().values.tolist() == list(range(64))
    assert gumbel_top_k(logits, 0).tolist() == []


def test_keys_are_within_63_bits():
    generator = torch.Generator().manual_seed(0)
    keys = [draw_key(generator) for _ in range(200)]
    assert all(0 <= key < 2**63 for key in keys)
    assert max(keys) > 2**62  # all below with probability 2^-200


def test_effective_support_counts_equally_likely_candidates():
    assert effective_support(torch.zeros(7)) == pytest.approx(7)
    assert effective_support(torch.tensor([5.0, 5.0, -torch.inf, 5.0])) == pytest.approx(3)
    assert effective_support(torch.tensor([2000.0, 0.0, 0.0])) == pytest.approx(1)
    # p = (3/4, 1/4): 1 / (9/16 + 1/16) = 1.6
    assert effective_support(torch.tensor([0.75, 0.25]).log()) == pytest.approx(1.6)


def test_an_infinite_gain_leaves_only_the_best():
    scores = torch.tensor([1.0, 3.0, -torch.inf, 3.0])
    assert scaled_logits(scores, float("inf")).tolist() == [-torch.inf, 0.0, -torch.inf, 0.0]
    assert scaled_logits(scores, 2.0).tolist() == [-4.0, 0.0, -torch.inf, 0.0]


@pytest.mark.parametrize(
    "batch_size, num_chunks, sizes",
    [
        (10, 4, [3, 3, 2, 2]),
        (2048, 16, [128] * 16),  # int(10240 * (1 - 0.8) / 16) is 127
        (5, 5, [1] * 5),
        (7, 1, [7]),
        (7, 16, [1] * 7),  # never more chunks than examples
    ],
)
def test_chunk_sizes_add_up_and_the_remainder_goes_first(batch_size, num_chunks, sizes):
    assert chunk_sizes(batch_size, num_chunks) == sizes


def test_more_draws_than_candidates_is_an_error():
    logits = torch.tensor([0.0, -torch.inf, 1.0, -torch.inf])
    with pytest.raises(ConfigError, match=r"can be drawn, 2 \(4 logits, 2 of them -inf\), got 3"):
        gumbel_top_k(logits, 3)
    with pytest.raises(ConfigError, match="got -1"):
        gumbel_top_k(logits, -1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_distribution_are_an_error(bad):
    with pytest.raises(NonFiniteError, match=r"1 of 2 logits are NaN or \+inf"):
        gumbel_top_k(torch.tensor([0.0, bad]), 1)


def test_logits_of_several_dimensions_are_an_error():
    with pytest.raises(ConfigError, match=r"one dimension, got shape \[2, 3\]"):
        gumbel_top_k(torch.zeros(2, 3), 1)
