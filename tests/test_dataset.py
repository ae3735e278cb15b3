"""`JESTDataset` yields exactly the examples that the rule selects, in the loops that users write.

pytest tests/test_dataset.py
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, flipped, tiny_dataset, to_tensor, tokenize
from support.shards import draw
from torch import Tensor
from torch.utils.data import DataLoader

from jest_stream import Embeddings, IterableSource, ReferenceCache, SelectionConfig, select_jointly
from jest_stream.scoring.two_tower import two_tower

pytestmark = pytest.mark.usefixtures("no_leaks")

VIEWS: dict[str, Any] = {"transform": to_tensor, "tokenizer": tokenize}
UNIFORM = SelectionConfig(method="uniform")

SHARDS = {"num_shards": 6, "examples_per_shard": 20}


jest = partial(tiny_dataset, batch_size=8, super_batch_size=24)
"""Batches of 8 out of 24, chosen by two untrained models."""


def keys(batches: Any) -> list[list[str]]:
    return [batch["key"] for batch in batches]


def test_every_batch_has_exactly_batch_size_distinct_examples(shards: list[str]) -> None:
    with jest(shards, batch_size=7, super_batch_size=None, filter_ratio=0.65) as dataset:
        for batch in islice(dataset, 12):
            assert len(set(batch["key"])) == 7
            assert batch["image"].shape == (7, 3, 8, 8)
            assert batch["text"].shape == (7, 4)


def test_the_loop_of_a_data_loader_stays_as_it_was(shards: list[str]) -> None:
    plain = [b for b in islice(jest(shards, as_dict=False), 5)]
    loader = DataLoader(jest(shards, as_dict=False), batch_size=None)
    for (images, texts), (expected_images, expected_texts) in zip(loader, plain, strict=False):
        assert torch.equal(images, expected_images)
        assert torch.equal(texts, expected_texts)


def test_images_stay_with_their_texts(shards: list[str]) -> None:
    expected = {f"{i:06d}": tokenize(draw(i)[1]) for i in range(120)}
    for batch in islice(jest(shards), 5):
        for key, text in zip(batch["key"], batch["text"], strict=True):
            assert torch.equal(text, expected[key])


def test_what_is_yielded_is_what_the_public_function_selects(shards: list[str]) -> None:
    """The whole path, by hand: same candidates, same embeddings, same noise, same choice."""
    learner, reference = TinyTwoTower(seed=1), TinyTwoTower(seed=2)
    candidates = next(iter(jest(shards, batch_size=24, selection=UNIFORM)))

    def embed(model: TinyTwoTower) -> Embeddings:
        with torch.no_grad():
            return two_tower(model).embed(candidates["image"], candidates["text"])

    chosen = next(iter(jest(shards, learner=learner, reference=reference)))
    is_subset = set(chosen["key"]) <= set(candidates["key"])
    assert is_subset

    # At this gain the choice is greedy, so that the noise of the run does not matter.
    greedy = SelectionConfig(num_chunks=4, gain=1e6)
    chosen = next(iter(jest(shards, learner=learner, reference=reference, selection=greedy)))
    selected = select_jointly(
        embed(learner), embed(reference), batch_size=8, num_chunks=4, gain=1e6
    )
    assert chosen["key"] == [candidates["key"][i] for i in selected.tolist()]


def test_uniform_reads_the_same_stream_and_only_what_it_trains_on(shards: list[str]) -> None:
    ratio = {"super_batch_size": None, "filter_ratio": 0.75}
    plain = jest(shards, selection=UNIFORM, **ratio)
    read = [key for batch in islice(plain, 8) for key in batch["key"]]
    assert plain.metrics()["samples_read"] == plain.metrics()["samples_trained"] == 64
    for start, batch in zip((0, 32), jest(shards, **ratio), strict=False):
        assert set(batch["key"]) < set(read[start : start + 32])


def test_one_pass_gives_each_example_at_most_once_and_counts_the_rest(shards: list[str]) -> None:
    dataset = jest(shards, batch_size=50, super_batch_size=None, selection=UNIFORM, repeat=False)
    first = [key for batch in keys(dataset) for key in batch]
    assert len(first) == len(set(first)) == 100
    assert dataset.metrics()["epoch_tail"] == 20
    second = [key for batch in keys(dataset) for key in batch]
    assert len(second) == len(set(second)) == 100
    assert first != second
    assert dataset.metrics()["epoch_tail"] == 40


def test_the_end_of_a_pass_still_chooses_from_what_is_left(shards: list[str]) -> None:
    dataset = jest(shards, batch_size=8, super_batch_size=50, repeat=False)
    assert len(keys(dataset)) == 3  # 50 + 50 + 20 candidates
    assert dataset.metrics()["samples_read"] == 120
    assert dataset.metrics()["epoch_tail"] == 0


def test_a_broken_off_pass_is_followed_by_the_next(shards: list[str]) -> None:
    dataset = jest(shards, batch_size=40, super_batch_size=None, selection=UNIFORM, repeat=False)
    for _ in dataset:
        break
    whole = [key for batch in keys(dataset) for key in batch]
    assert len(set(whole)) == 120


def test_steps_per_epoch_cuts_the_stream_without_losing_any(shards: list[str]) -> None:
    endless = keys(islice(jest(shards), 9))
    dataset = jest(shards, steps_per_epoch=3)
    assert len(dataset) == len(DataLoader(dataset, batch_size=None)) == 3
    assert [keys(dataset) for _ in range(3)] == [endless[0:3], endless[3:6], endless[6:9]]


def test_an_iter_after_a_break_is_a_full_epoch_that_goes_on_where_the_last_stopped(
    shards: list[str],
) -> None:
    endless = keys(islice(jest(shards), 4))
    dataset = jest(shards, steps_per_epoch=3)
    for batch in dataset:
        assert batch["key"] == endless[0]
        break
    assert keys(dataset) == endless[1:4]


def test_an_endless_stream_has_no_length(shards: list[str]) -> None:
    with pytest.raises(TypeError, match="pass steps_per_epoch"):
        len(jest(shards))


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_do_not_change_what_is_yielded(shards: list[str], num_workers: int) -> None:
    expected = list(islice(jest(shards, train_transform=flipped), 6))
    with jest(shards, train_transform=flipped, num_workers=num_workers) as dataset:
        for batch, plain in zip(dataset, expected, strict=False):
            assert batch["key"] == plain["key"]
            assert torch.equal(batch["image"], plain["image"])


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_loss_follows_the_learner_and_repr_says_so(shards: list[str], has_bias: bool) -> None:
    learner = TinyTwoTower(has_bias=has_bias)
    family = "sigmoid" if has_bias else "softmax"
    dataset = jest(shards, learner=learner, reference=TinyTwoTower(seed=2, has_bias=has_bias))
    assert f"joint learnability, {family} loss | 8 of 24" in repr(dataset)
    for _ in islice(dataset, 2):
        assert "step" in repr(dataset)
    assert "learner copy 1 steps old" in repr(dataset)


@pytest.mark.parametrize("method", ["joint", "independent"])
@pytest.mark.parametrize(
    ("score", "models"),
    [
        ("easy_reference", {"learner": None}),
        ("hard_learner", {"reference": None}),
        (lambda learner, reference: learner - 0.5 * reference, {}),
    ],
)
def test_a_score_needs_only_the_models_it_names(
    shards: list[str], method: Any, score: Any, models: dict[str, None]
) -> None:
    config = SelectionConfig(method=method, score=score)
    for batch in islice(jest(shards, selection=config, **models), 3):
        assert len(set(batch["key"])) == 8


def test_the_reference_may_have_its_own_view_tokens_and_dimension(shards: list[str]) -> None:
    class Wide(TinyTwoTower):
        def encode_image(self, image: Tensor) -> Tensor:
            assert image.shape[1:] == (3, 16, 16)
            return super().encode_image(image[..., ::2, ::2])

        def encode_text(self, text: Tensor) -> Tensor:
            assert text.shape[1:] == (3,)
            return super().encode_text(text)

    reference = Wide(seed=2, width=40)
    dataset = jest(
        shards,
        reference=reference,
        reference_transform=lambda image: to_tensor(image).repeat(1, 2, 2),
        reference_tokenizer=lambda text: tokenize(text)[:3],
    )
    batch = next(iter(dataset))
    assert set(batch) == {"image", "text", "key", "weight"}
    assert batch["image"].shape == (8, 3, 8, 8)


def test_processors_that_return_mappings_keep_their_structure(shards: list[str]) -> None:
    class Named(TinyTwoTower):
        def encode_image(self, pixel_values: Tensor) -> Tensor:
            return super().encode_image(pixel_values)

        def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().encode_text(input_ids * attention_mask)

    dataset = jest(
        shards,
        learner=Named(seed=1),
        reference=Named(seed=2),
        transform=lambda image: {"pixel_values": to_tensor(image)[None]},
        tokenizer=lambda text: {"input_ids": tokenize(text), "attention_mask": [1, 1, 1, 0]},
        as_dict=False,
    )
    image, text = next(iter(dataset))
    assert {name: list(value.shape) for name, value in image.items()} == {
        "pixel_values": [8, 3, 8, 8]
    }
    assert {name: list(value.shape) for name, value in text.items()} == {
        "input_ids": [8, 4],
        "attention_mask": [8, 4],
    }


def test_the_train_view_is_random_repeatable_and_made_for_the_selected_only(
    shards: list[str],
) -> None:
    seen = []

    def view(image: Any) -> Tensor:
        seen.append(image)
        return flipped(image)

    first, second = (next(iter(jest(shards, train_transform=view, lookahead=0))) for _ in range(2))
    scored = next(iter(jest(shards)))
    assert len(seen) == 16
    assert torch.equal(first["image"], second["image"])
    assert first["key"] == scored["key"]
    assert not torch.equal(first["image"], scored["image"])


def test_the_users_random_state_is_left_alone(shards: list[str]) -> None:
    def noisy(image: Any) -> Tensor:
        random.random()
        np.random.rand()
        return flipped(image)

    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    for _ in islice(jest(shards, transform=noisy, train_transform=noisy), 3):
        pass
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_batches_take_part_in_autograd_even_under_inference_mode(shards: list[str]) -> None:
    dataset = iter(jest(shards))
    next(dataset)
    with torch.inference_mode():
        next(dataset)  # also scores the super-batch of the next step
    batch = next(dataset)
    weight = torch.ones((), requires_grad=True)
    ((batch["image"] * weight).sum() + (batch["weight"] * weight).sum()).backward()
    assert weight.grad is not None


def pairs() -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(40):
        image, text = draw(i)
        yield to_tensor(image), tokenize(text)


def test_ready_pairs_and_examples_in_memory_are_sources_too() -> None:
    ready = list(pairs())
    dataset = jest(ready, transform=None, tokenizer=None, as_dict=False, repeat=False)
    assert [len(images) for images, _ in dataset] == [8, 8]
    examples = [{"image": draw(i)[0], "text": draw(i)[1]} for i in range(40)]
    dataset = jest(IterableSource(examples), as_dict=False, repeat=False)
    assert [len(images) for images, _ in dataset] == [8, 8]


def test_a_streaming_dataset_of_the_hub_library_is_a_source() -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"image": draw(i)[0], "caption": draw(i)[1]} for i in range(40)]
    source = datasets.Dataset.from_list(rows).to_iterable_dataset()
    dataset = jest(source, text_key="caption", repeat=False)
    assert [len(batch["key"]) for batch in dataset] == [8, 8]


def test_keys_may_be_functions_of_the_decoded_example(shards: list[str]) -> None:
    dataset = jest(
        shards,
        image_key=lambda example: example["jpg"],
        text_key=lambda example: f"{example['json']['index']} of all",
    )
    batch = next(iter(dataset))
    for key, text in zip(batch["key"], batch["text"], strict=True):
        assert torch.equal(text, tokenize(f"{int(key)} of all"))


def test_metrics_say_what_was_read_scored_and_trained(shards: list[str]) -> None:
    dataset = jest(shards)
    for _ in islice(dataset, 4):
        pass
    metrics = dataset.metrics()
    assert metrics["steps"] == 4
    assert metrics["samples_read"] == 4 * 24
    assert metrics["samples_scored"] == 5 * 24  # one super-batch is in flight
    assert metrics["samples_trained"] == 4 * 8
    assert metrics["staleness"] == 1
    assert 1 <= metrics["effective_support"] <= 24
    assert metrics["selected_score"] > metrics["candidate_score"]


def test_a_super_batch_larger_than_the_data_counts_its_duplicates(shards: list[str]) -> None:
    dataset = jest(shards[:1], super_batch_size=30)
    next(iter(dataset))
    assert dataset.metrics()["super_batch_duplicates"] == 10


@pytest.mark.parametrize("is_cached", [False, True])
def test_the_loss_is_one_that_all_models_of_the_score_have(
    shards: list[str], tmp_path: Path, is_cached: bool
) -> None:
    """A model without a bias says nothing by a sigmoid; by the softmax a bias does not matter."""
    clip, siglip = (TinyTwoTower(2, has_bias=has_bias) for has_bias in (False, True))
    if is_cached:
        references = [
            ReferenceCache.build(shards, model, tmp_path / name, **VIEWS)
            for model, name in ((clip, "clip"), (siglip, "siglip"))
        ]
    else:
        references = [clip, siglip]
    hard, easy = (SelectionConfig(score=name) for name in ("hard_learner", "easy_reference"))
    for learner, reference, selection, loss in (
        (siglip, references[0], None, "softmax"),
        (clip, references[1], None, "softmax"),
        (siglip, references[1], None, "sigmoid"),
        (siglip, references[0], hard, "sigmoid"),
        (clip, references[1], easy, "sigmoid"),
        (siglip, references[0], SelectionConfig(loss="sigmoid"), "sigmoid"),
    ):
        options = {"learner": copy.deepcopy(learner), "reference": reference}
        with jest(shards, selection=selection, **options) as dataset:
            assert f"{loss} loss" in repr(dataset)
            next(iter(dataset))
