"""The demo's tokens are the same everywhere, and the adapters take its model as it is."""

from __future__ import annotations

import copy
import subprocess
import sys

import torch
from PIL import Image
from torch.nn import functional as F

from jest_stream.demo.data import half_view
from jest_stream.demo.model import (
    MAX_TOKENS,
    VOCABULARY_SIZE,
    HashTokenizer,
    TwoTowerModel,
    sigmoid_loss,
)
from jest_stream.scoring.two_tower import two_tower

CAPTION = "fire engine: engine, fire, truck"


def test_a_caption_has_the_same_tokens_in_another_process():
    code = (
        "from jest_stream.demo.model import HashTokenizer;"
        f"print(HashTokenizer()({CAPTION!r}).tolist())"
    )
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(HashTokenizer()(CAPTION).tolist())


def test_tokens_of_a_hand_worked_caption():
    # <ox> is a word and, too short to cut, its own only piece.
    (row,) = HashTokenizer()("ox").tolist()
    word = row[0]
    assert row == [word, word] + [0] * (MAX_TOKENS - 2)
    # <fire> gives the word, <fir, fire, ire>.
    (row,) = HashTokenizer()(["fire"]).tolist()
    assert sum(token != 0 for token in row) == 4


def test_any_text_fits_the_token_table():
    texts = ["", "x" * 1000, "\u2764\ufe0f \u706b", "A, b; C!" * 100]
    tokens = HashTokenizer()(texts)
    assert tokens.shape == (4, MAX_TOKENS) and tokens.dtype == torch.int64
    assert 0 <= tokens.min() and tokens.max() < VOCABULARY_SIZE
    assert tokens[0].count_nonzero() == 0
    assert TwoTowerModel().encode_text(tokens).isfinite().all()


def test_case_and_punctuation_do_not_matter():
    tokenizer = HashTokenizer()
    assert torch.equal(tokenizer("Fire-engine!"), tokenizer("fire engine"))


def test_the_model_is_a_two_tower_model_with_a_bias():
    tower = two_tower(TwoTowerModel())
    assert tower.has_bias
    embeddings = tower.embed(images(3), HashTokenizer()(["a", "b", "c"]))
    assert embeddings.image.shape == embeddings.text.shape == (3, 64)
    assert torch.allclose(embeddings.image.norm(dim=-1), torch.ones(3))


def test_it_takes_half_the_resolution_for_scoring():
    full, half = images(2), images(2)[:, :, ::2, ::2]
    model = TwoTowerModel().eval()
    assert model.encode_image(half).shape == model.encode_image(full).shape


def test_half_view_averages_four_pixels():
    image = Image.new("RGB", (32, 32), (0, 0, 0))
    image.putpixel((0, 0), (200, 100, 40))
    view = half_view(image)
    assert view.shape == (3, 16, 16) and view.dtype == torch.uint8
    assert view[:, 0, 0].tolist() == [50, 25, 10] and view[:, 1:, 1:].count_nonzero() == 0


def test_the_loss_is_that_of_every_pair_alone():
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(7.0), torch.tensor(-3.0)
    pairs = [
        -F.logsigmoid((1 if i == j else -1) * (scale * image[i] @ text[j] + bias))
        for i in range(5)
        for j in range(5)
    ]
    assert torch.allclose(sigmoid_loss(image, text, scale, bias), torch.stack(pairs).sum() / 5)


def test_a_training_step_lowers_the_loss_of_its_batch():
    torch.manual_seed(0)
    model = TwoTowerModel()
    pixels, tokens = images(16), HashTokenizer()([f"caption {i}" for i in range(16)])
    before = model(pixels, tokens)
    before.backward()
    stepped = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, old in zip(stepped.parameters(), model.parameters(), strict=True):
            parameter -= 1e-2 * old.grad
    assert stepped(pixels, tokens) < before


def images(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, 3, 32, 32), generator=generator).to(torch.uint8)
