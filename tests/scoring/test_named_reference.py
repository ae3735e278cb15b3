"""References by name are open_clip's own models, with the views that belong to them.

pytest tests/scoring/test_named_reference.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.clip_models import config, write_folder
from support.leaks import no_leaks  # noqa: F401
from support.models import TinyTwoTower, to_tensor, tokenize
from support.shards import draw, write_shards

from jest_stream import JESTDataset
from jest_stream.errors import ConfigError, UnsafeDataError
from jest_stream.scoring.named_reference import is_named, load_reference

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a small model that open_clip knows for the time of a test."""
    import json

    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-clip", config())
    assert "tiny-clip" in open_clip.list_models()
    return json.loads('"tiny-clip"')


def rows(module: Any, view: Any) -> torch.Tensor:
    with torch.no_grad():
        return module.encode_image(view(draw(3)[0])[None])


def test_a_folder_is_read_as_open_clip_reads_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", seed=3)
    named = load_reference(folder)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert not named.module.training
    assert torch.equal(rows(named.module, named.transform), rows(theirs.eval(), transform))
    text = ["a red circle"]
    assert torch.equal(named.tokenizer(text), open_clip.get_tokenizer(f"local-dir:{folder}")(text))


def test_a_name_and_a_safetensors_file_make_a_model(tmp_path: Path, registered: str) -> None:
    folder = write_folder(tmp_path / "model", seed=3)
    weights = f"{folder}/open_clip_model.safetensors"
    named = load_reference(f"open_clip:{registered}/{weights}")
    state = load_file(weights)
    assert all(torch.equal(state[k], v) for k, v in named.module.state_dict().items())


SIGLIP_VIEW = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}


def know(name: str, monkeypatch: pytest.MonkeyPatch, **tags: dict[str, Any]) -> None:
    """Lets open_clip know weights of a model for the time of a test."""
    from open_clip import pretrained

    monkeypatch.setitem(pretrained._PRETRAINED, name, tags)


def test_a_file_is_shown_images_as_the_known_weights_of_its_model(
    tmp_path: Path, registered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = f"{write_folder(tmp_path / 'model')}/open_clip_model.safetensors"
    image = draw(3, size=64)[0].crop((0, 0, 64, 40))
    plain = load_reference(f"open_clip:{registered}/{weights}").transform(image)
    know(registered, monkeypatch, webli=SIGLIP_VIEW, other=SIGLIP_VIEW)
    found = load_reference(f"open_clip:{registered}/{weights}").transform(image)
    squashed = image.resize((32, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(squashed)).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, (expected - 0.5) / 0.5)
    know(registered, monkeypatch, webli=SIGLIP_VIEW, openai={})  # nobody knows which of them
    assert torch.equal(load_reference(f"open_clip:{registered}/{weights}").transform(image), plain)


def test_a_name_alone_means_the_only_weights_there_are(
    tmp_path: Path, registered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = f"{write_folder(tmp_path / 'model', seed=3)}/open_clip_model.safetensors"
    monkeypatch.setenv("HOME", str(tmp_path))  # where open_clip keeps what it downloads,
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # with a bar that needs no thread
    know(registered, monkeypatch, webli={"url": f"file://{weights}", **SIGLIP_VIEW})
    found = load_reference(f"open_clip:{registered}").module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in load_file(weights).items())
    know(registered, monkeypatch, webli=SIGLIP_VIEW, other=SIGLIP_VIEW)
    with pytest.raises(ConfigError, match="names no weights.*Known tags: webli, other"):
        load_reference(f"open_clip:{registered}")


def test_a_name_without_weights_says_which_there_are(registered: str) -> None:
    with pytest.raises(ConfigError, match="names no weights.*laion2b_s34b_b79k.*create_model"):
        load_reference("open_clip:ViT-B-32")
    with pytest.raises(ConfigError, match="Known tags: none"):
        load_reference(f"open_clip:{registered}")


def test_unknown_names_are_refused(registered: str) -> None:
    with pytest.raises(ConfigError, match="open_clip has no model 'ViT-Z-9'"):
        load_reference("open_clip:ViT-Z-9/openai")
    with pytest.raises(ConfigError, match="knows no weights 'best' of ViT-B-32; it knows openai"):
        load_reference("open_clip:ViT-B-32/best")
    with pytest.raises(ConfigError, match="there is no file '/nowhere/model.safetensors'"):
        load_reference(f"open_clip:{registered}//nowhere/model.safetensors")
    with pytest.raises(ConfigError, match=r"holds weights, but of which model\?"):
        load_reference("/some/model.safetensors")


def test_what_could_hold_code_is_never_opened(tmp_path: Path, registered: str) -> None:
    canary = tmp_path / "canary"
    attack = tmp_path / "open_clip_pytorch_model.bin"
    attack.write_bytes(b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.")
    for reference in (
        f"open_clip:{registered}/{attack}",
        str(attack),
        f"open_clip:ViT-B-32/{tmp_path}/model.pt",
    ):
        assert is_named(reference)
        with pytest.raises(UnsafeDataError, match="is no .safetensors file"):
            load_reference(reference)
    folder = write_folder(tmp_path / "model")
    Path(folder, "open_clip_model.safetensors").unlink()
    attack.rename(Path(folder, attack.name))
    with pytest.raises(UnsafeDataError, match="open_clip_pytorch_model.bin' is no .safetensors"):
        load_reference(folder)
    assert not canary.exists()


def test_the_safetensors_file_is_preferred_to_others(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", seed=3)
    expected = load_file(f"{folder}/open_clip_model.safetensors")
    Path(folder, "a.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    found = load_reference(folder).module.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in found.items())


@pytest.mark.parametrize("damage", ["cut", "other model", "config"])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, damage: str) -> None:
    folder = Path(write_folder(tmp_path / "model"))
    weights = folder / "open_clip_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config":
        (folder / "open_clip_config.json").write_text("{}")
    else:
        write_folder(tmp_path / "other", dimension=16)
        (tmp_path / "other" / weights.name).rename(weights)
    with pytest.raises(ConfigError, match=r"reference='.*model' cannot be loaded by open_clip"):
        load_reference(str(folder))


def test_addresses_of_caches_are_no_models(tmp_path: Path) -> None:
    assert not any(map(is_named, ("s3://bucket/cache", str(tmp_path), tmp_path, None, 7)))
    assert not is_named(TinyTwoTower())


def test_a_named_reference_brings_its_own_views(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "s")
    folder = write_folder(tmp_path / "model", image_size=48, dimension=24)
    options = {"transform": to_tensor, "tokenizer": tokenize, "batch_size": 4}
    with JESTDataset(shards, learner=TinyTwoTower(1), reference=folder, **options) as dataset:
        images, texts = next(iter(dataset))
        assert images.shape == (4, 3, 8, 8) and texts.shape == (4, 4)
    seen: list[Any] = []

    def own(image: Any) -> torch.Tensor:
        seen.append(image)
        return load(image)

    load = load_reference(folder).transform
    with JESTDataset(
        shards, learner=TinyTwoTower(1), reference=folder, reference_transform=own, **options
    ) as dataset:
        next(iter(dataset))
    assert seen
