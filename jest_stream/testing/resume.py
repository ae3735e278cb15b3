"""Holds sources, transforms and models of your own to the resume contract.

`assert_resumes` runs a dataset without interruption, then stops it at several steps, sends its
state through a file, resumes in a new dataset and demands the same batches, bit for bit. It needs
no test framework.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jest_stream.config import as_integer
from jest_stream.dataset import JESTDataset


def assert_resumes(
    make_dataset: Callable[[], JESTDataset],
    *,
    num_steps: int = 6,
    at: Iterable[int] | None = None,
    learner: nn.Module | None = None,
    train_step: Callable[[Any], object] | None = None,
    include_learner_copy: bool = False,
) -> None:
    """Raises unless a dataset that is stopped and resumed gives the batches of a run without stop.

    For example, in a test of a source of your own:

        assert_resumes(lambda: JESTDataset(MySource(), batch_size=4, as_dict=True,
                                           selection=SelectionConfig(method="uniform")))

    Args:
      make_dataset: returns a new dataset, always with the same arguments. Called twice for each
        step and once besides; each dataset is closed here.
      num_steps: batches of the uninterrupted run. Where a pass ends, the next one begins.
      at: steps to stop at, in [0, num_steps]. Default: all of them.
      learner: the model that the datasets score with, if `train_step` changes it. Its weights are
        put back before each run and at the end.
      train_step: called with each batch, as a training loop would.
      include_learner_copy: as in `JESTDataset.state_dict`.

    Raises:
      AssertionError: naming the step at which it was resumed, the batch and the first difference.
    """
    num_steps = as_integer("num_steps", num_steps, 1)
    start = None if learner is None else copy.deepcopy(learner.state_dict())
    train = train_step or (lambda batch: None)
    try:
        with make_dataset() as dataset:
            expected = _batches(dataset, num_steps, train)
        for step in range(num_steps + 1) if at is None else at:
            assert 0 <= step <= num_steps, f"at={step} is not in [0, {num_steps}]"
            _put_back(learner, start)
            with make_dataset() as dataset:
                before = _batches(dataset, step, train)
                state = dataset.state_dict(include_learner_copy=include_learner_copy)
            # Else every later difference would be put down to resuming.
            _require_same(before, expected, 0, "a second run from the start")
            loaded = _through_file(state)
            with make_dataset() as dataset:
                dataset.load_state_dict(loaded)
                # Saved again before the first batch: a run may be stopped twice in a row.
                again = dataset.state_dict(include_learner_copy=include_learner_copy)
                difference = _difference(again, loaded)
                assert not difference, (
                    f"resumed at step {step}: state_dict() right after load_state_dict(state) is "
                    f"not the state that was loaded: state{difference}"
                )
                rest = _batches(dataset, num_steps - step, train)
            _require_same(rest, expected[step:], step, f"resumed at step {step}")
    finally:
        _put_back(learner, start)


def _batches(
    dataset: JESTDataset, num_steps: int, train_step: Callable[[Any], object]
) -> list[Any]:
    """Returns the next batches, over the ends of passes; each is trained on."""
    batches: list[Any] = []
    num_empty = 0
    while len(batches) < num_steps:
        num_before = len(batches)
        for batch in dataset:
            batches.append(copy.deepcopy(batch))  # the step may change it in place
            train_step(batch)
            if len(batches) == num_steps:
                break
        # A pass that was resumed at its end may have no batches left; two such in a row cannot be.
        num_empty = num_empty + 1 if len(batches) == num_before else 0
        assert num_empty < 2, f"the dataset ended after {len(batches)} of {num_steps} batches"
    return batches


def _put_back(learner: nn.Module | None, weights: Mapping[str, Any] | None) -> None:
    if learner is not None and weights is not None:
        learner.load_state_dict(weights)


def _through_file(state: Mapping[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:
        raise AssertionError(
            f"the state cannot be loaded with torch.load(weights_only=True): {error}"
        ) from error


def _require_same(found: list[Any], expected: list[Any], first: int, run: str) -> None:
    for step, (batch, wanted) in enumerate(zip(found, expected, strict=False), start=first):
        difference = _difference(batch, wanted)
        assert not difference, (
            f"{run}: the batch of step {step} is not that of the uninterrupted run: "
            f"batch{difference}"
        )


def _difference(found: Any, expected: Any) -> str:
    """Returns the first difference of two values, as in `['key'][2] is 'a', was 'b'`; or ""."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return _tensor_difference(found, expected)
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        if found.keys() != expected.keys():
            return f" has {sorted(found)}, had {sorted(expected)}"
        pairs = [(name, found[name], expected[name]) for name in expected]
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f" has {len(found)} entries, had {len(expected)}"
        pairs = [(i, found[i], expected[i]) for i in range(len(expected))]
    else:
        # The last case is NaN, which is taken to equal itself here.
        is_same = (
            found is expected or found == expected or (found != found and expected != expected)
        )
        return "" if is_same else f" is {found!r}, was {expected!r}"
    for name, one, other in pairs:
        if difference := _difference(one, other):
            return f"[{name!r}]{difference}"
    return ""


def _tensor_difference(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        was = f"{list(expected.shape)} {expected.dtype}"
        return f" is {list(found.shape)} {found.dtype}, was {was}"
    is_same = found == expected.to(found.device)
    if found.is_floating_point():
        is_same |= found.isnan() & expected.to(found.device).isnan()
    if bool(is_same.all()):
        return ""
    where = tuple((~is_same).nonzero()[0].tolist())
    place = f"[{', '.join(map(str, where))}]" if where else ""
    return (
        f"{place} is {found[where].item()!r}, was {expected[where].item()!r}; "
        f"{int((~is_same).sum())} of {found.numel()} entries differ"
    )
