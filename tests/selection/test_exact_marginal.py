"""With `exact_marginal=True` every draw follows what an example adds to the batch's softmax loss.

pytest tests/selection/test_exact_marginal.py
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.selection_inputs import noise_of, random_embeddings

from jest_stream.selection.drawing import DrawRule
from jest_stream.selection.joint import joint_selection
from jest_stream.selection.sampling import chunk_sizes


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_draw_is_a_top_k_of_the_differences_of_two_batch_losses(data):
    """For any sizes, models and dtypes, given our own earlier chunks, up to rounding."""
    num_examples = data.draw(st.integers(2, 16), label="B")
    batch_size = data.draw(st.integers(1, num_examples), label="b")
    num_chunks = data.draw(st.integers(1, batch_size), label="chunks")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    score = data.draw(st.sampled_from(["learnability", "easy_reference", "hard_learner"]))
    gain = data.draw(st.sampled_from([0.1, 1.0, 10.0]))
    seed = data.draw(st.integers(0, 10**6))
    models = [
        random_embeddings(
            num_examples, data.draw(st.integers(3, 9)), seed=seed + i, scale=data.draw(scales)
        )
        for i, scales in enumerate((st.floats(0.5, 60), st.floats(0.5, 60)))
    ]
    models = [replace(m, image=m.image.to(dtype), text=m.text.to(dtype)) for m in models]
    selected = joint_selection(
        *models,
        batch_size=batch_size,
        num_chunks=num_chunks,
        score=score,
        loss="softmax",
        exact_marginal=True,
        rule=DrawRule(gain=gain),
        key=seed,
        step=1,
    ).indices.tolist()
    assert len(set(selected)) == batch_size
    learner = None if score == "easy_reference" else models[0]
    reference = None if score == "hard_learner" else models[1]
    noise, first = noise_of(seed, 1, num_chunks, num_examples), 0
    for chunk, size in enumerate(chunk_sizes(batch_size, num_chunks)):
        before, drawn = selected[:first], selected[first : first + size]
        scores = torch.tensor(naive.softmax_exact_marginal(learner, reference, before)).double()
        keys = gain * scores + noise[chunk]
        keys[before] = -torch.inf
        tolerance = 1e-4 * (1 + gain * scores.abs().max().item())
        torch.testing.assert_close(keys[drawn], keys.topk(size).values, rtol=0, atol=tolerance)
        first += size


@pytest.mark.parametrize("seed", range(8))
def test_marginals_add_up_to_the_loss_of_the_batch_which_no_subset_beats_by_much(seed):
    learner = random_embeddings(9, 4, seed=seed, scale=8.0)
    reference = random_embeddings(9, 4, seed=seed + 50, scale=8.0)

    def learnability(batch: list[int]) -> float:
        loss = naive.softmax_batch_loss(learner, batch)
        return loss - naive.softmax_batch_loss(reference, batch)

    selection = joint_selection(
        learner, reference, batch_size=4, num_chunks=4, loss="softmax", exact_marginal=True,
        rule=DrawRule(gain=math.inf), key=seed, step=0,
    )  # fmt: skip
    found = learnability(selection.indices.tolist())
    # One example per chunk: the scores are differences of successive batch losses.
    assert selection.selected_score.item() * 4 == pytest.approx(found, rel=1e-4, abs=1e-5)
    every = sorted(learnability(list(subset)) for subset in itertools.combinations(range(9), 4))
    assert found <= every[-1] + 1e-5
    # The first is drawn at random, since a batch of one has no loss: above half of all 126.
    assert found > every[len(every) // 2]
