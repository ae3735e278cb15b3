"""The package ships real pairs under permissive licences, and holds its test sets back."""

from __future__ import annotations

import io
import re
from collections import Counter

import pyarrow.parquet
import pytest
from PIL import Image

from jest_stream.demo.data import ASSETS, TARGET, evaluation_sets, load_reference
from jest_stream.demo.training import recall

PERMISSIVE = {
    "Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT", "Unlicense",
}  # fmt: skip
COLUMNS = ["key", "image", "text", "set", "family", "category", "licence", "role"]


@pytest.fixture(scope="module")
def rows():
    return pyarrow.parquet.read_table(ASSETS / "icons.parquet").to_pylist()


def test_there_are_20_000_pairs_of_several_vendors_to_train_on(rows):
    pool = [row for row in rows if row["role"] == "pool"]
    assert len(pool) >= 20_000
    assert len({row["set"] for row in pool}) >= 100
    emoji = Counter(row["set"] for row in pool if row["family"] == "emoji")
    assert len(emoji) >= 5 and min(emoji.values()) >= 500


def test_every_pair_has_a_caption_a_set_a_category_and_a_permissive_licence(rows):
    assert list(rows[0]) == COLUMNS
    assert all(all(row.values()) for row in rows)
    assert {row["licence"] for row in rows} <= PERMISSIVE


def test_all_assets_together_take_at_most_15_mb():
    sizes = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert sizes.keys() >= {"icons.parquet", "reference.safetensors", "ATTRIBUTION.md"}
    assert sum(sizes.values()) <= 15_000_000


def test_every_image_decodes_to_32_by_32_pixels(rows):
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]))
        image.load()
        assert image.format == "WEBP" and image.size == (32, 32), row["key"]


def test_what_is_tested_on_is_in_no_pool(rows):
    pool = [row for row in rows if row["role"] == "pool"]
    held_out = [row for row in rows if row["role"] != "pool"]
    assert {row["role"] for row in held_out} == {"target", "general"}
    for column in ("set", "key", "image"):  # lossless: equal pixels are equal bytes
        assert not {row[column] for row in pool} & {row[column] for row in held_out}
    redrawn = {row["set"] for row in pool if re.match("fluent-emoji|lucide|feather", row["set"])}
    assert not redrawn  # sets that share drawings with held-out ones


def test_keys_are_unique_and_name_tar_members(rows):
    keys = [row["key"] for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[a-z0-9-]+/[a-z0-9-]+", key) for key in keys)


def test_a_caption_fits_one_picture_of_its_held_out_set(rows):
    captions = [(row["set"], row["text"]) for row in rows if row["role"] != "pool"]
    assert len(set(captions)) == len(captions)


def test_the_attribution_names_every_set_with_its_count_and_licence(rows):
    page = (ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    counts = Counter((row["set"], row["licence"]) for row in rows)
    lines = re.findall(r"^\| ([a-z0-9-]+) \| .+ \| (\S+) \| (\d+) \|$", page, re.MULTILINE)
    assert {(name, licence): int(count) for name, licence, count in lines} == counts


def test_the_reference_knows_emoji_that_it_was_not_trained_on():
    """Chance is 5 of 1,589: 0.3 %. It had 36.7 % when it was trained."""
    sets = evaluation_sets()
    assert next(iter(sets)) == TARGET
    assert len(sets) == 5 and all(len(pairs.images) >= 300 for pairs in sets.values())
    pairs = sets[TARGET]
    small = type(pairs)(pairs.images[:, :, ::2, ::2], pairs.tokens)
    assert recall(load_reference(), small).at_5 > 20
