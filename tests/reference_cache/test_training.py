"""Training from a cache chooses what training with the live reference chooses.

pytest tests/reference_cache/test_training.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.cache_builds import NUM_SHARDS, PER_SHARD, build
from support.clip_models import write_folder
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor, tokenize, train_step
from support.s3_server import S3Server
from support.shards import make_example, members, write_shards, write_tar
from torch.nn import functional as F

from jest_stream import (
    Embeddings,
    IterableSource,
    JESTDataset,
    ReferenceCache,
    SelectionConfig,
    StorageConfig,
    TargetSimilarity,
    TarSource,
)
from jest_stream.errors import ConfigError, ReferenceMismatchError
from jest_stream.scoring.named_reference import NamedReference, load_reference
from jest_stream.scoring.reference import ReferenceModel
from jest_stream.selection.joint import joint_selection
from jest_stream.testing.resume import assert_resumes
from jest_stream.types import REFERENCE_ROW
from jest_stream.views.columns import collate, gather_rows
from jest_stream.views.score import ScoreView

SHARDS = {"num_shards": NUM_SHARDS, "examples_per_shard": PER_SHARD}

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, shards: list[str]) -> str:
    folder = tmp_path_factory.mktemp("cache")
    build(shards, folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> NamedReference:
    """A real open_clip model with random weights, as a folder that was written and read."""
    return load_reference(write_folder(tmp_path_factory.mktemp("clip"), seed=5))


def jest(source: Any, learner: TinyTwoTower | None, reference: Any, **options: Any) -> JESTDataset:
    defaults = {
        "transform": to_tensor,
        "tokenizer": tokenize,
        "batch_size": 6,
        "super_batch_size": 20,
        "as_dict": True,
    }
    return JESTDataset(source, learner=learner, reference=reference, **{**defaults, **options})


def keys(source: Any, reference: Any, num_steps: int = 8, **options: Any) -> list[list[str]]:
    """Keys of the batches of a training run."""
    learner = TinyTwoTower(1)
    seen = []
    with jest(source, learner, reference, **options) as dataset:
        for _, batch in zip(range(num_steps), dataset, strict=False):
            seen.append(batch["key"])
            train_step(learner, (batch["image"], batch["text"]))
    return seen


def overlap(found: list[list[str]], expected: list[list[str]]) -> float:
    pairs = list(zip(found, expected, strict=True))
    return sum(len(set(a) & set(b)) for a, b in pairs) / sum(len(b) for _, b in pairs)


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cached_run_is_the_live_run(shards: list[str], cache: str, num_workers: int) -> None:
    live = keys(shards, TinyTwoTower(2))
    assert overlap(keys(shards, cache, num_workers=num_workers), live) >= 0.99
    assert overlap(keys(shards, TinyTwoTower(3)), live) < 0.9, "another reference chooses otherwise"


@pytest.mark.usefixtures("no_leaks")
def test_scores_of_a_real_model_are_the_live_ones_but_for_rounding(
    tmp_path: Path, clip: NamedReference
) -> None:
    paths = write_shards(tmp_path / "s", num_shards=2, examples_per_shard=64)
    views = {"transform": clip.transform, "tokenizer": clip.tokenizer}
    cache = ReferenceCache.build(paths, clip.module, tmp_path / "cache", **views)
    source = TarSource(paths)
    rows = [e[REFERENCE_ROW] for s in (0, 1) for e, _ in cache.join(source).read(s)]
    cached = cache.embeddings(*gather_rows(rows))

    view = ScoreView(
        keys=("jpg", "txt"), learner=tuple(views.values()), reference=(None, None), keep_image=False
    )
    columns = collate([view(e) for s in (0, 1) for e, _ in source.read(s)])
    live = ReferenceModel(clip.module).embed(columns["image"], columns["text"])
    assert cached.logit_scale == pytest.approx(float(live.logit_scale), rel=1e-6)
    assert cached.logit_bias == float(live.logit_bias)
    for tower in ("image", "text"):
        found, expected = getattr(cached, tower), getattr(live, tower)
        # Half of float16's spacing below 1 is 2^-12.
        assert (found - expected).abs().max() < 2**-11
        assert torch.allclose(found.norm(dim=-1), torch.ones(128), atol=1e-6)
    scores = [
        model.logit_scale * model.image @ model.text.T + model.logit_bias
        for model in (cached, live)
    ]
    assert (scores[0] - scores[1]).abs().max() < 2**-11 * float(live.logit_scale) * 2
    learner_model = TinyTwoTower(1)
    small = [
        ScoreView(
            keys=("jpg", "txt"),
            learner=(to_tensor, tokenize),
            reference=(None, None),
            keep_image=False,
        )(e)
        for s in (0, 1)
        for e, _ in source.read(s)
    ]
    stacked = collate(small)
    learner = ReferenceModel(learner_model).embed(stacked["image"], stacked["text"])
    same = 0
    for step in range(20):
        chosen = [
            set(joint_selection(learner, r, batch_size=32, key=0, step=step).indices.tolist())
            for r in (cached, live)
        ]
        same += len(chosen[0] & chosen[1])
    assert same / (20 * 32) >= 0.99


@pytest.mark.usefixtures("no_leaks")
def test_every_way_to_name_a_cache_gives_the_same_run(
    shards: list[str], cache: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    expected = keys(shards, cache)
    assert keys(shards, Path(cache)) == expected
    assert keys(shards, f"file://{cache}") == expected
    with ReferenceCache(cache) as opened:
        assert keys(shards, opened) == expected
        assert keys(TarSource(shards), opened) == expected
    remote = f"s3://{s3.make_bucket()}/deep/cache/"
    build(shards, remote).close()
    assert keys(shards, remote) == expected
    kept = StorageConfig(cache_folder=str(tmp_path / "disk"))
    assert keys(shards, remote, storage=kept) == expected
    assert list((tmp_path / "disk").iterdir())


@pytest.mark.usefixtures("no_leaks")
def test_shards_and_their_cache_in_the_same_store(
    shards: list[str], cache: str, s3: S3Server
) -> None:
    bucket = s3.put_files(shards)
    urls = [f"{bucket}/{Path(path).name}" for path in shards]
    build(urls, f"{bucket}/cache", storage=s3.config).close()
    remote = ReferenceCache(f"{bucket}/cache", storage=s3.config)
    assert remote.shards[0].version and remote.shards[0].name == urls[0]
    found = keys(urls, f"{bucket}/cache", storage=s3.config, num_workers=1)
    # The copies on disk have no ETag; their names and lengths are the same.
    assert found == keys(shards, remote) == keys(shards, cache)
    remote.close()


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"lookahead": 2}, {"repeat": False}])
def test_every_step_resumes_exactly(shards: list[str], cache: str, options: Any) -> None:
    learner = TinyTwoTower(1)
    assert_resumes(
        lambda: jest(shards, learner, cache, with_reference=True, **options),
        num_steps=7,
        learner=learner,
        train_step=lambda batch: train_step(learner, (batch["image"], batch["text"])),
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("method", ["joint", "uniform"])
def test_reference_embeddings_of_a_live_model_resume_exactly(
    shards: list[str], method: Any, lookahead: int
) -> None:
    learner = TinyTwoTower(1)
    assert_resumes(
        lambda: jest(
            shards,
            learner,
            TinyTwoTower(2),
            with_reference=True,
            lookahead=lookahead,
            selection=SelectionConfig(method=method),
        ),
        num_steps=6,
        learner=learner,
        train_step=lambda batch: train_step(learner, (batch["image"], batch["text"])),
    )


@pytest.mark.parametrize("method", ["joint", "independent", "uniform"])
@pytest.mark.parametrize("is_cached", [True, False])
def test_batches_have_the_references_embeddings_of_what_was_chosen(
    shards: list[str], cache: str, method: Any, is_cached: bool
) -> None:
    reference = TinyTwoTower(2)
    with jest(
        shards,
        TinyTwoTower(1),
        cache if is_cached else reference,
        with_reference=True,
        selection=SelectionConfig(method=method),
    ) as dataset:
        for _, batch in zip(range(4), dataset, strict=False):
            found = batch["reference"]
            assert set(found) == {"image", "text", "logit_scale", "logit_bias"}
            for tower, encode in (
                ("image", reference.encode_image),
                ("text", reference.encode_text),
            ):
                rows = F.normalize(encode(batch[tower]), dim=-1)
                assert found[tower].dtype == torch.float32 and not found[tower].requires_grad
                assert torch.allclose(found[tower], rows, atol=1e-3)
            assert torch.allclose(found["logit_scale"], reference.logit_scale.exp())
            assert float(found["logit_bias"]) == -3.0
            Embeddings(**found)


def test_reference_embeddings_need_a_dict_and_a_reference(shards: list[str]) -> None:
    with pytest.raises(ConfigError, match="with_reference=True adds an entry .* as_dict=True"):
        jest(shards, TinyTwoTower(1), TinyTwoTower(2), with_reference=True, as_dict=False)
    with pytest.raises(ConfigError, match="with_reference=True yields .* reference=None"):
        jest(
            shards,
            TinyTwoTower(1),
            None,
            with_reference=True,
            selection=SelectionConfig(score="hard_learner"),
        )


def test_a_plain_dict_has_no_reference(shards: list[str], cache: str) -> None:
    with jest(shards, TinyTwoTower(1), cache) as dataset:
        assert set(next(iter(dataset))) == {"image", "text", "key", "weight"}


def test_easy_reference_from_a_cache_runs_no_model_at_all(
    shards: list[str], cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = SelectionConfig(score="easy_reference")
    expected = keys(shards, TinyTwoTower(2), selection=selection)
    with jest(shards, None, cache, selection=selection) as dataset:
        found = [batch["key"] for _, batch in zip(range(8), dataset, strict=False)]
        assert "sigmoid loss" in repr(dataset)
    assert overlap(found, expected) >= 0.99


def test_uniform_selection_leaves_the_cache_alone(shards: list[str], cache: str) -> None:
    selection = SelectionConfig(method="uniform")
    assert keys(shards, cache, selection=selection) == keys(shards, None, selection=selection)


def test_targets_are_compared_with_cached_embeddings(shards: list[str], cache: str) -> None:
    targets = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    selection = SelectionConfig(terms=(TargetSimilarity(targets=targets, weight=5.0),))
    live = keys(shards, TinyTwoTower(2), selection=selection)
    assert overlap(keys(shards, cache, selection=selection), live) >= 0.99


def test_the_reference_has_a_size_tokenizer_and_dimension_of_its_own(
    shards: list[str], tmp_path: Path, clip: NamedReference
) -> None:
    folder = write_folder(tmp_path / "clip", seed=5)
    views = {"transform": clip.transform, "tokenizer": clip.tokenizer}
    ReferenceCache.build(shards, clip.module, tmp_path / "cache", **views)
    live = keys(shards, folder)
    assert overlap(keys(shards, str(tmp_path / "cache")), live) >= 0.99
    assert (
        keys(
            shards,
            clip.module,
            reference_transform=clip.transform,
            reference_tokenizer=clip.tokenizer,
        )
        == live
    )


def test_what_could_not_be_cached_is_left_out_and_counted_in_training(tmp_path: Path) -> None:
    paths = []
    for shard in range(2):
        examples = [make_example(index + 20 * shard) for index in range(20)]
        examples[7]["jpg"] = b"no picture"
        paths.append(write_tar(tmp_path / f"{shard}.tar", members(examples)))
    build(paths, tmp_path / "cache", on_bad_example="skip")
    seen: set[str] = set()
    options = {"on_bad_example": "skip", "super_batch_size": 12, "repeat": False, "num_workers": 1}
    with jest(paths, TinyTwoTower(1), str(tmp_path / "cache"), **options) as dataset:
        for batch in dataset:
            seen.update(batch["key"])
        metrics = dataset.metrics()
    assert not seen & {"000007", "000027"}
    assert metrics["skipped/not_cached"] == 2
    assert metrics["samples_scored"] == 36


def test_iterables_train_from_a_cache_in_parts(tmp_path: Path) -> None:
    examples = [make_example(index) for index in range(60)]
    build(examples, tmp_path / "cache", part_size=16)
    live = keys(IterableSource(examples), TinyTwoTower(2))
    assert overlap(keys(examples, str(tmp_path / "cache")), live) >= 0.99
    assert overlap(keys(examples, str(tmp_path / "cache"), num_workers=1), live) >= 0.99


def test_a_checkpoint_does_not_mind_where_embeddings_come_from(
    shards: list[str], cache: str
) -> None:
    learner = TinyTwoTower(1)
    with jest(shards, learner, TinyTwoTower(2)) as live:
        iterator = iter(live)
        for _ in range(2):
            next(iterator)
        state = live.state_dict()
        expected = [next(iterator)["key"] for _ in range(2)]
    with jest(shards, learner, cache) as cached:
        cached.load_state_dict(state)
        found = [batch["key"] for _, batch in zip(range(2), cached, strict=False)]
    assert found[:1] == expected[:1]
    assert overlap(found, expected) >= 0.8


def test_a_reference_by_name_is_cached_and_expected_with_its_views(
    shards: list[str], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "clip", seed=5)
    by_name = ReferenceCache.build(shards, folder, tmp_path / "name")
    named = load_reference(folder)
    views = {"transform": named.transform, "tokenizer": named.tokenizer}
    ReferenceCache.build(shards, named.module, tmp_path / "module", **views)
    names = sorted(path.name for path in (tmp_path / "module").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "name").iterdir())
    for name in names:
        assert (tmp_path / "name" / name).read_bytes() == (tmp_path / "module" / name).read_bytes()
    by_name.check(folder)
    by_name.check({"reference": folder})
    with pytest.raises(ReferenceMismatchError, match="another reference: its weights"):
        by_name.check(write_folder(tmp_path / "other", seed=6))
    with pytest.raises(ConfigError, match="open_clip has no model 'ViT-Z-9'"):
        by_name.check("open_clip:ViT-Z-9")
    with pytest.raises(ConfigError, match="reference must be a module, the name .* got None"):
        by_name.check({"reference": None})
