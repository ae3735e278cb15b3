"""Epochs have known lengths where data allow it; all ranks end together, and trainers may seek.

pytest tests/test_epochs.py
"""

from __future__ import annotations

import importlib.util
import types
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower
from support.pairs import Pairs
from support.ranks import on_ranks
from torch import Tensor
from torch.utils.data import DataLoader

from jest_stream import JESTDataset, SelectionConfig, gather_state_dict
from jest_stream.config.selection import SelectionConfig as Rule
from jest_stream.config.sizes import Layout, resolve_sizes
from jest_stream.errors import ConfigError
from jest_stream.pipeline.epochs import PassLength
from jest_stream.sources.lanes import lane_shards, shard_order
from jest_stream.types import Cursor

pytestmark = pytest.mark.usefixtures("no_leaks")

UNIFORM = SelectionConfig(method="uniform")


def jest(source: Any, batch_size: int = 4, **options: Any) -> JESTDataset:
    defaults: dict[str, Any] = {"selection": UNIFORM, "as_dict": True}
    return JESTDataset(source, batch_size=batch_size, **{**defaults, **options})


def keys(batches: Any) -> list[str]:
    """The keys, sorted within each batch: there the order depends on the step."""
    return [key for batch in batches for key in sorted(batch["key"])]


def test_a_stream_in_epochs_knows_their_length() -> None:
    dataset = jest(Pairs([10, 10]), steps_per_epoch=3)
    assert dataset.num_batches == len(dataset) == len(DataLoader(dataset, batch_size=None)) == 3
    assert dataset.num_samples == 12
    assert len(keys(dataset)) == dataset.num_samples


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([10, 7, 3], {}),
        ([10, 7, 3], {"super_batch_size": 9}),
        ([10, 7, 4], {"super_batch_size": 9}),
        ([10, 7, 30], {"super_batch_size": None, "filter_ratio": {0: 0.5, 2: 0.0}}),
        ([4], {"super_batch_size": 50}),
    ],
)
def test_one_pass_knows_its_length_from_the_counts(
    lengths: list[int], options: dict[str, Any]
) -> None:
    dataset = jest(Pairs(lengths), repeat=False, **options)
    num_batches, num_samples = dataset.num_batches, dataset.num_samples
    found = keys(dataset)
    assert num_batches == len(found) // 4 and num_samples == len(found)
    read = dataset.metrics()["samples_read"] + dataset.metrics()["epoch_tail"]
    assert read == sum(lengths)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (Pairs([9, 9]), {}),
        (Pairs([9, 9], None), {"repeat": False}),
        (Pairs([9, 9], [9, None]), {"repeat": False}),
        (Pairs([9, 9]), {"repeat": False, "on_bad_example": "skip"}),
        (Pairs([9, 9]), {"repeat": False, "on_bad_shard": "skip"}),
    ],
)
def test_a_length_that_nobody_knows_is_an_error_that_says_what_to_do(
    source: Pairs, options: dict[str, Any]
) -> None:
    dataset = jest(source, **options)
    for name in ("num_batches", "num_samples"):
        with pytest.raises(ConfigError, match="not known; pass steps_per_epoch"):
            getattr(dataset, name)
    with pytest.raises(TypeError, match="no length; pass steps_per_epoch"):
        len(dataset)
    assert len(list(islice(dataset, 2))) == 2


@pytest.mark.parametrize("counts", [[9], [9, -1], [9, 2.5]])
def test_counts_that_cannot_be_right_are_refused(counts: list[Any]) -> None:
    with pytest.raises(ConfigError, match="source.num_examples"):
        len(jest(Pairs([9, 9], counts), repeat=False))


def test_set_epoch_goes_to_a_pass() -> None:
    source = Pairs([4] * 8)
    passes = jest(source, repeat=False)
    expected = [keys(passes) for _ in range(3)]
    assert len({tuple(each) for each in expected}) == 3
    dataset = jest(source, repeat=False)
    for epoch in (2, 0, 0, 1):
        dataset.set_epoch(epoch)
        assert keys(dataset) == expected[epoch]
    dataset.set_epoch(0)
    next(iter(dataset))
    dataset.set_epoch(0)  # broken off: from its start again
    assert keys(dataset) == expected[0]


@pytest.mark.parametrize("options", [{"repeat": False}, {"steps_per_epoch": 8}])
def test_set_epoch_leaves_a_state_alone_that_was_loaded_for_that_epoch(
    options: dict[str, Any],
) -> None:
    source = Pairs([4] * 8)
    trained = jest(source, **options)
    epochs = [keys(trained) for _ in range(3)]
    for step in range(1, 8):
        first = jest(source, **options)
        first.set_epoch(0)
        keys(first)
        first.set_epoch(1)
        list(islice(first, step))
        resumed = jest(source, **options)
        resumed.load_state_dict(first.state_dict())
        resumed.set_epoch(1)
        assert keys(resumed) == epochs[1][4 * step :]
        resumed.set_epoch(2)
        assert keys(resumed) == epochs[2]


def test_set_epoch_begins_a_stream_elsewhere_only_if_nothing_was_drawn() -> None:
    source = Pairs([4] * 8)
    plain = keys(islice(jest(source, lanes=4), 16))
    with pytest.raises(ConfigError, match="epoch must be an integer of at least 0, got -1"):
        jest(source, lanes=4).set_epoch(-1)
    fresh = jest(source, lanes=4, steps_per_epoch=4)
    fresh.set_epoch(1)
    assert fresh.state_dict()["step"] == 4
    # Its lanes are in their second pass.
    assert keys(fresh) == plain[32:48]
    drawn = jest(source, lanes=4, steps_per_epoch=4)
    drawn.set_epoch(0)
    assert keys(drawn) == plain[:16]
    drawn.set_epoch(7)
    assert keys(drawn) == plain[16:32]


def test_what_was_in_flight_of_a_broken_off_pass_is_counted() -> None:
    dataset = jest(Pairs([20, 20]), repeat=False, super_batch_size=8, lookahead=2)
    next(iter(dataset))
    assert dataset.metrics()["epoch_abandoned"] == 0
    list(dataset)
    metrics = dataset.metrics()
    assert metrics["epoch_abandoned"] == 16
    assert metrics["samples_read"] == 8 + 40


def pass_length(lengths: list[int], batch_size: int, super_batch_size: int) -> PassLength:
    sizes = resolve_sizes(Rule(), batch_size, 0.0, super_batch_size)
    return PassLength(counts=lengths, sizes=sizes, seed=5)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_every_rank_can_keep_what_the_counts_promise(data: st.DataObject) -> None:
    world_size = data.draw(st.sampled_from([1, 2, 3]))
    num_lanes = world_size * data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=num_lanes, max_size=num_lanes + 4))
    batch_size = data.draw(st.integers(1, 4))
    super_batch_size = batch_size + data.draw(st.integers(0, 5))
    layout = Layout(num_lanes=num_lanes, rank=0, world_size=world_size)
    length = pass_length(lengths, batch_size, super_batch_size)
    cursors = {}
    for lane in range(num_lanes):
        order = shard_order(lane_shards(len(lengths), num_lanes, lane, 5), lane, 5, 2)
        at = data.draw(st.integers(0, len(order)))
        within = data.draw(st.integers(0, lengths[order[at]])) if at < len(order) else 0
        cursors[lane] = data.draw(st.sampled_from([Cursor(2, at, 0, within), Cursor(3, 0, 0, 0)]))

    def batches_of(rank: int) -> int:
        """Counts by hand: takes the examples left, super-batch by super-batch."""
        left = 0
        for lane in layout.lanes_of(rank):
            if cursors[lane].epoch == 2:
                order = shard_order(lane_shards(len(lengths), num_lanes, lane, 5), lane, 5, 2)
                left += sum(lengths[shard] for shard in order[cursors[lane].shard :])
                left -= cursors[lane].num_before
        batches = 0
        while left >= batch_size:
            left -= min(super_batch_size, left)
            batches += 1
        return batches

    found = length.batches_left(cursors, layout, epoch=2, step=0)
    assert found == min(batches_of(rank) for rank in range(world_size))


UNEVEN = [9, 14, 3, 11, 8, 21, 6]  # 72 examples; the lanes of two ranks differ by some


def trained_on(dataset: JESTDataset) -> list[str]:
    """The keys of one epoch, in lockstep: a rank that ends earlier fails the others."""
    seen = []
    for batch in dataset:
        torch.distributed.all_reduce(torch.ones(1))
        seen += batch["key"]
    torch.distributed.barrier()
    return seen


def passes_on_a_rank() -> dict[str, Any]:
    """Everything that two ranks must agree on."""
    dataset = jest(Pairs(UNEVEN), repeat=False, super_batch_size=6, lookahead=2)
    found: dict[str, Any] = {"lengths": [], "passes": []}
    for _ in range(3):
        found["lengths"].append((dataset.num_batches, dataset.num_samples))
        found["passes"].append(trained_on(dataset))
    metrics = dataset.metrics()
    found["read"], found["tail"] = metrics["samples_read"], metrics["epoch_tail"]
    iterator = iter(dataset)
    found["begun"] = [key for _ in range(3) for key in next(iterator)["key"]]
    found["state"] = gather_state_dict(dataset, timeout_s=20)
    resumed = jest(Pairs(UNEVEN), repeat=False, super_batch_size=6, lookahead=2)
    resumed.load_state_dict(found["state"])
    resumed.set_epoch(3)
    found["rest"] = trained_on(resumed)
    for source, options, message in (
        (Pairs(UNEVEN, None), {}, "the source does not know how many examples its shards hold"),
        (Pairs(UNEVEN), {"on_bad_example": "skip"}, "on_bad_example='skip' and on_bad_shard='r"),
        (Pairs(UNEVEN), {"on_bad_shard": "skip"}, "nobody can count beforehand"),
        (Pairs([9, 2]), {}, "a whole pass over 11 examples in 2 shards gives one of the 2 ranks"),
    ):
        with pytest.raises(ConfigError, match=message):
            iter(jest(source, repeat=False, **options))
    liar = jest(Pairs(UNEVEN, [30] * 7), repeat=False, super_batch_size=6)
    with pytest.raises(ConfigError, match="hold fewer examples than source.num_examples says"):
        list(liar)
    return found


@pytest.mark.timeout(90)
def test_all_ranks_end_a_pass_after_the_same_number_of_batches(tmp_path: Path) -> None:
    ranks = on_ranks(2, tmp_path, passes_on_a_rank)
    everything = {f"{shard}-{i}" for shard, length in enumerate(UNEVEN) for i in range(length)}
    for epoch in range(3):
        lengths = {rank["lengths"][epoch] for rank in ranks}
        ((num_batches, num_samples),) = lengths
        together = [key for rank in ranks for key in rank["passes"][epoch]]
        assert len(together) == len(set(together)) == num_samples == 8 * num_batches
        assert set(together) <= everything
    assert sum(rank["read"] + rank["tail"] for rank in ranks) == 3 * sum(UNEVEN)
    assert max(rank["tail"] for rank in ranks) > 0
    begun = [key for rank in ranks for key in rank["begun"]]
    rest = [key for rank in ranks for key in rank["rest"]]
    assert not set(begun) & set(rest) and len(begun + rest) == 8 * ranks[0]["lengths"][0][0]

    one = jest(Pairs(UNEVEN), batch_size=8, repeat=False, super_batch_size=12, lookahead=2)
    one.load_state_dict(ranks[0]["state"])
    rest_on_one = keys(one)
    assert not set(begun) & set(rest_on_one) and len(set(rest_on_one)) == len(rest_on_one)


def test_other_ranks_lose_and_repeat_nothing_of_a_pass() -> None:
    """Uniform at the batch's size: every candidate is handed out, so that all can be counted."""
    source = Pairs([12, 12, 12, 12])
    whole = jest(source, batch_size=8, repeat=False)
    begun = keys(islice(whole, 2))
    state = whole.state_dict()
    assert state["epoch_batches"] is None
    length = PassLength(counts=[12] * 4, sizes=resolve_sizes(UNIFORM, 4, 0.0, None), seed=0)
    cursors = {int(lane): Cursor(*place[:-1]) for lane, place in state["lanes"].items()}
    layout = Layout(num_lanes=4, rank=0, world_size=2)
    assert length.batches_left(cursors, layout, epoch=0, step=2) == 4
    resumed = jest(source, batch_size=8, repeat=False)
    resumed.load_state_dict(state)
    assert sorted(begun + keys(resumed)) == sorted(f"{s}-{i}" for s in range(4) for i in range(12))


class OpenClipLike(TinyTwoTower):
    """Gives what open_clip's losses take."""

    def forward(self, image: Tensor, text: Tensor) -> Any:
        return {
            "image_features": torch.nn.functional.normalize(self.encode_image(image), dim=-1),
            "text_features": torch.nn.functional.normalize(self.encode_text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


@pytest.mark.skipif(
    importlib.util.find_spec("open_clip_train") is None, reason="open_clip_train is not there"
)
@pytest.mark.filterwarnings("ignore")  # of what open_clip imports
def test_the_training_loop_of_open_clip_runs_unchanged() -> None:
    open_clip = pytest.importorskip("open_clip")
    train = pytest.importorskip("open_clip_train.train")
    model = OpenClipLike(1, has_bias=False)
    dataset = jest(
        Pairs([40, 40]),
        learner=model,
        reference=TinyTwoTower(2, has_bias=False),
        selection=None,
        steps_per_epoch=3,
        as_dict=False,
    )
    data = {"train": types.SimpleNamespace(dataloader=dataset, set_epoch=dataset.set_epoch)}
    args = types.SimpleNamespace(
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=1,
        skip_scheduler=True,
        grad_clip_norm=None,
        rank=0,
        local_rank=0,
        world_size=1,
        log_every_n_steps=1,
        log_local=False,
        wandb=False,
        batch_size=4,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model.image.detach().clone()
    for epoch in range(2):
        train.train_one_epoch(
            model, data, open_clip.ClipLoss(), epoch, optimizer, None, None, None, args
        )
    assert dataset.metrics()["steps"] == 6
    assert not torch.equal(model.image, before)
