"""Bad input is refused with what, got, why and fix; half-bad input is warned of once.

pytest tests/selection/test_selection_errors.py
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.selection_inputs import random_embeddings
from torch import Tensor

from jest_stream.errors import ConfigError, NonFiniteError
from jest_stream.selection.joint import select_jointly


def good(seed=0):
    return random_embeddings(20, 8, seed=seed)


def spoiled(name: str, value: float, rows: tuple[int, ...]):
    model = good()
    tensor: Tensor = getattr(model, name).clone()
    for row in rows:
        tensor[row, 3] = value
    return replace(model, **{name: tensor})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_embeddings_that_are_not_finite_are_named_and_counted(value):
    for tower in ("image", "text"):
        with pytest.raises(NonFiniteError, match=(
            f"learner {tower} embeddings hold NaN or infinity in 2 of 20 rows, the first of them "
            "row 4: .*half precision"
        )):  # fmt: skip
            select_jointly(spoiled(tower, value, (4, 9)), good(), batch_size=5, num_chunks=2)
        with pytest.raises(NonFiniteError, match=f"reference {tower} .* in 1 of 20 rows"):
            select_jointly(good(), spoiled(tower, value, (0,)), batch_size=5, num_chunks=2)


@pytest.mark.parametrize("field", ["logit_scale", "logit_bias"])
@pytest.mark.parametrize("value", [float("nan"), torch.tensor(torch.inf)])
def test_scales_that_are_not_finite_are_named(field, value):
    with pytest.raises(NonFiniteError, match=f"reference {field} is (nan|inf)"):
        select_jointly(good(), replace(good(), **{field: value}), batch_size=5, num_chunks=2)


def test_scores_that_are_not_finite_are_an_error():
    with pytest.raises(NonFiniteError, match="scores hold NaN or infinity .* score function"):
        select_jointly(
            good(), good(1), batch_size=5, num_chunks=2, score=lambda a, b: (a - b).log()
        )


def test_rows_without_unit_norm_are_warned_of_with_the_worst_norm():
    model = good()
    long = model.text.clone()
    long[7] *= 3.14159
    long[8] *= 1.5
    with pytest.warns(UserWarning, match=(
        "learner text embeddings are not unit norm: the worst row has norm 3\\. .*normalize"
    )):  # fmt: skip
        select_jointly(replace(model, text=long), good(1), batch_size=5, num_chunks=2)


def test_the_warning_comes_once_however_often_though_the_worst_norm_varies():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for factor in (3.14, 2.6, 3.4):
            model = replace(good(), image=good().image * factor)
            select_jointly(model, good(1), batch_size=5, num_chunks=2)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("factor, shown", [(0.9, "0.9"), (1.03, "1.03"), (1.12, "1.1"), (23, "20")])
def test_the_worst_norm_is_shown_rounded(factor, shown):
    model = replace(good(), image=good().image * factor)
    with pytest.warns(UserWarning, match=rf"learner image .* worst row has norm {shown}\. "):
        select_jointly(model, good(1), batch_size=5, num_chunks=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_normalised_in_half_precision_are_no_reason_to_warn(dtype):
    models = [replace(m, image=m.image.to(dtype), text=m.text.to(dtype)) for m in (good(), good(1))]
    select_jointly(*models, batch_size=5, num_chunks=2)


@pytest.mark.parametrize("batch_size, num_chunks, message", [
    (21, 4, "batch_size=21 is above the number of candidates, 20: .*larger super-batch"),
    (0, 1, "batch_size must be an integer of at least 1, got 0"),
    (5.0, 1, "batch_size must be an integer of at least 1, got 5.0"),
    (True, 1, "batch_size must be an integer of at least 1, got True"),
    (5, 0, "num_chunks must be an integer of at least 1, got 0"),
    (5, -1, "num_chunks must be an integer of at least 1, got -1"),
])  # fmt: skip
def test_sizes_that_cannot_be_are_errors(batch_size, num_chunks, message):
    with pytest.raises(ConfigError, match=message):
        select_jointly(good(), good(1), batch_size=batch_size, num_chunks=num_chunks)


def test_sizes_may_be_integers_of_numpy_or_torch():
    expected = select_jointly(good(), good(1), batch_size=5, num_chunks=2, gain=1e9)
    chosen = select_jointly(
        good(), good(1), batch_size=np.int64(5), num_chunks=torch.tensor(2), gain=1e9
    )
    assert chosen.tolist() == expected.tolist()


@pytest.mark.parametrize("num_sweeps", [-1, 1.5, True])
@pytest.mark.parametrize("num_chunks", [1, 2])
def test_sweeps_that_cannot_be_are_errors(num_sweeps, num_chunks):
    with pytest.raises(ConfigError, match="num_sweeps must be an integer of at least 0, got "):
        select_jointly(good(), good(1), batch_size=5, num_chunks=num_chunks, num_sweeps=num_sweeps)


@pytest.mark.parametrize("gain", [0, -1.0, float("nan")])
def test_gains_that_are_not_positive_are_errors(gain):
    with pytest.raises(ConfigError, match="gain must be above 0, got .*select_uniformly"):
        select_jointly(good(), good(1), batch_size=5, num_chunks=2, gain=gain)


@pytest.mark.parametrize("learner, reference, score, message", [
    (None, good(), "learnability", "'learnability' needs learner embeddings, got learner=None.*"
     "score='easy_reference'"),
    (good(), None, "learnability", "needs reference embeddings, .*score='hard_learner'"),
    (None, good(), "hard_learner", "'hard_learner' needs learner embeddings"),
    (good(), None, "easy_reference", "'easy_reference' needs reference embeddings"),
    (good(), None, lambda a, b: a, "a score function needs reference embeddings"),
])  # fmt: skip
def test_a_missing_model_is_an_error_that_names_a_score_without_it(
    learner, reference, score, message
):
    with pytest.raises(ConfigError, match=message):
        select_jointly(learner, reference, batch_size=5, num_chunks=2, score=score)


@pytest.mark.parametrize("changed, message", [
    ({"image": torch.ones(20, 9)}, r"learner .* got image \[20, 9\] and text \[20, 8\]"),
    ({"image": torch.ones(8)}, r"two \[B, D\] tensors of one shape, got image \[8\]"),
    ({"image": torch.ones(0, 8), "text": torch.ones(0, 8)}, r"got image \[0, 8\]"),
    ({"text": torch.ones(20, 8, dtype=torch.int64)}, "floating point, got .*text torch.int64"),
    ({"text": torch.empty(20, 8, device="meta")}, "image on cpu and text on meta.*to()"),
    ({"logit_scale": torch.ones(2)}, r"logit_scale must be one number, got shape \[2\]"),
    ({"logit_bias": torch.empty((), device="meta")}, "logit_bias is on meta, the embeddings on"),
])  # fmt: skip
def test_embeddings_that_do_not_fit_together_are_errors(changed, message):
    with pytest.raises(ConfigError, match=message):
        select_jointly(replace(good(), **changed), good(1), batch_size=5, num_chunks=2)


def test_models_of_other_examples_or_devices_are_errors():
    with pytest.raises(ConfigError, match="same examples in the same order, got 20 and 21 rows"):
        select_jointly(good(), random_embeddings(21, 8, seed=0), batch_size=5, num_chunks=2)
    away = replace(
        good(), image=torch.empty(20, 8, device="meta"), text=torch.empty(20, 8, device="meta")
    )
    with pytest.raises(ConfigError, match=r"one device, got cpu and meta.*\.to\(\)"):
        select_jointly(good(), away, batch_size=5, num_chunks=2)


def test_losses_that_do_not_exist_or_have_no_pairs_are_errors():
    with pytest.raises(ConfigError, match="loss must be 'sigmoid' or 'softmax', got 'auto'"):
        select_jointly(good(), good(1), batch_size=5, num_chunks=2, loss="auto")
    with pytest.raises(ConfigError, match="function of pair losses, but loss='softmax' has none"):
        select_jointly(
            good(), good(1), batch_size=5, num_chunks=2, loss="softmax", score=lambda a, b: a - b
        )
