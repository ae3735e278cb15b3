"""Builds real image-text pairs out of npm packages: icons and emoji with their names, 32 px.

    npm install --ignore-scripts @iconify/json cldr-annotations-full \\
        cldr-annotations-derived-full @mdi/svg @tabler/icons lucide-static \\
        @fortawesome/fontawesome-free
    pip install resvg-py                                      # besides jest_stream

    python build_icons.py --npm node_modules --demo assets/   # the file that the package ships
    python build_icons.py --npm node_modules --curated curated.parquet   # trains the reference
    python build_icons.py --npm node_modules --large shards/  # tar shards of all sets

The same packages give the same bytes. Only sets under permissive licences are used.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import webdataset
from attribution import attribution_page
from catalogue import Captions, Icon, IconSet, read_icon_sets, read_icons
from rendering import render_all

TARGET = "fluent-emoji-flat"
"""The reference's domain: emoji by a vendor whose drawings are in no pool and no reference."""
GENERAL = ("flat-color-icons", "healthicons", "lucide", "streamline-kameleon-color")
"""Held-out sets of other styles and subjects."""
RELATIVES = {"feather", "fluent-emoji", "fluent-emoji-high-contrast", "lucide-lab"}
"""Redrawings or forks of held-out sets: neither in the pool nor in the reference's data."""
CURATED = ("emojione", "noto", "noto-v1", "twemoji")
"""The sets that the reference learns from: emoji in colour with clean names."""
BRANDS = {"gcp", "selfhst", "streamline-logos", "thesvg", "thesvg-color", "token", "token-branded"}
"""Collections of company logos and ticker symbols whose own terms are unclear: not shipped."""

POOL_EMOJI = 9_000
POOL_OTHERS = 32_000
MAX_HELD_OUT = 500
EXAMPLES_PER_SHARD = 10_000

Row = dict[str, Any]


def main() -> None:
    args = _parse_arguments()
    start = time.monotonic()
    npm, dropped = Path(args.npm), Counter[str]()
    icon_sets, captions = read_icon_sets(npm), Captions(npm)
    if args.demo:
        chosen = choose_demo(npm, icon_sets, captions)
        rows = rows_of(chosen, size=args.size, jobs=args.jobs, dropped=dropped)
        folder = Path(args.demo)
        folder.mkdir(parents=True, exist_ok=True)
        write_parquet(rows, folder / "icons.parquet")
        (folder / "ATTRIBUTION.md").write_text(attribution_page(rows, icon_sets), encoding="utf-8")
        print(f"{len(rows)} pairs in {folder}: {dict(Counter(row['role'] for row in rows))}")
    if args.curated:
        icons = [(icon, "curated") for icon in choose_curated(npm, icon_sets, captions)]
        rows = rows_of(icons, size=args.size, jobs=args.jobs, dropped=dropped)
        write_parquet(rows, Path(args.curated))
        print(f"{len(rows)} pairs in {args.curated}")
    if args.large:
        icons_of_all = ((icon, "pool") for icon in all_icons(npm, icon_sets, captions))
        rows = rows_of(icons_of_all, size=args.size, jobs=args.jobs, dropped=dropped)
        num_shards = write_shards(rows, Path(args.large))
        num_sets = len({row["set"] for row in rows})
        print(f"{len(rows)} pairs of {num_sets} sets in {num_shards} shards")
    print(f"dropped {dict(dropped)}; {time.monotonic() - start:.0f} s")


def choose_demo(
    npm: Path, icon_sets: dict[str, IconSet], captions: Captions
) -> list[tuple[Icon, str]]:
    """Returns the icons that the package ships with their roles, held-out ones first.

    First because the first of exact duplicates stays: held-out pictures are in no pool.
    """
    emoji, others, held_out = [], [], []
    for prefix, icon_set in sorted(icon_sets.items()):
        if not icon_set.is_permissive or prefix in RELATIVES | BRANDS:
            continue
        icons = [icon for icon in read_icons(npm, icon_set, captions) if not icon.has_skin_tone]
        if prefix == TARGET:
            held_out.append([(icon, "target") for icon in _one_per_caption(icons)])
        elif prefix in GENERAL:
            unique = _evenly([_one_per_caption(icons)], MAX_HELD_OUT)
            held_out.append([(icon, "general") for icon in unique])
        elif icon_set.family == "emoji":
            emoji.append(icons)
        else:
            others.append(icons)
    pool = _evenly(emoji, POOL_EMOJI) + _evenly(others, POOL_OTHERS)
    pool.sort(key=lambda icon: _shuffle_key("order", icon))
    return [pair for pairs in held_out for pair in pairs] + [(icon, "pool") for icon in pool]


def choose_curated(npm: Path, icon_sets: dict[str, IconSet], captions: Captions) -> list[Icon]:
    """Returns the icons that the reference learns from."""
    return [
        icon
        for prefix in CURATED
        for icon in read_icons(npm, icon_sets[prefix], captions)
        if not icon.has_skin_tone
    ]


def all_icons(npm: Path, icon_sets: dict[str, IconSet], captions: Captions) -> Iterator[Icon]:
    """Yields every icon of every permissive set that is neither held out nor a relative."""
    left_out = RELATIVES | {TARGET, *GENERAL}
    for prefix, icon_set in sorted(icon_sets.items()):
        if icon_set.is_permissive and prefix not in left_out:
            yield from read_icons(npm, icon_set, captions)


def rows_of(
    icons: Iterable[tuple[Icon, str]], *, size: int, jobs: int, dropped: Counter[str]
) -> list[Row]:
    """Returns one row per rendered icon."""
    roles: dict[str, str] = {}

    def remembered() -> Iterator[Icon]:
        for icon, role in icons:
            roles[icon.key] = role
            yield icon

    return [
        {
            "key": icon.key,
            "image": picture,
            "text": icon.text,
            "set": icon.set.prefix,
            "family": icon.set.family,
            "category": icon.category,
            "licence": icon.set.licence,
            "role": roles[icon.key],
        }
        for icon, picture in render_all(remembered(), size=size, jobs=jobs, dropped=dropped)
    ]


def write_parquet(rows: list[Row], path: Path) -> None:
    """Writes the rows; the repetitive columns as dictionaries, all under zstd."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=["set", "family", "category", "licence", "role"],
    )


def write_shards(rows: list[Row], folder: Path) -> int:
    """Writes tar shards of webp, txt and json members; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    rows.sort(key=lambda row: _digest("order", row["key"]))
    pattern = f"{folder}/icons-%05d.tar"
    # Members have a fixed time, so that the same rows give the same bytes.
    with webdataset.ShardWriter(
        pattern, maxcount=EXAMPLES_PER_SHARD, maxsize=math.inf, mtime=0, verbose=0
    ) as writer:
        for row in rows:
            about = {name: row[name] for name in ("set", "family", "category", "licence")}
            members = {"webp": row["image"], "txt": row["text"], "json": about}
            writer.write({"__key__": row["key"], **members})
    return -(-len(rows) // EXAMPLES_PER_SHARD)


def _evenly(groups: list[list[Icon]], count: int) -> list[Icon]:
    """Returns `count` icons, as many of each group as of any other while they last."""
    groups = [sorted(group, key=lambda icon: _shuffle_key("choice", icon)) for group in groups]
    taken: list[Icon] = []
    for left, group in zip(range(len(groups), 0, -1), sorted(groups, key=len), strict=True):
        taken += group[: (count - len(taken)) // left]
    return taken


def _one_per_caption(icons: list[Icon]) -> list[Icon]:
    """A caption that fits two pictures has no right answer in a retrieval test."""
    first: dict[str, Icon] = {}
    for icon in icons:
        first.setdefault(icon.text, icon)
    return list(first.values())


def _shuffle_key(purpose: str, icon: Icon) -> bytes:
    return _digest(purpose, icon.key)


def _digest(purpose: str, key: str) -> bytes:
    """A seeded shuffle that no version of Python or change of the list alters."""
    return hashlib.blake2b(f"{purpose}:{key}".encode(), digest_size=8).digest()


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--npm", required=True, help="the node_modules folder")
    parser.add_argument("--demo", help="folder for the Parquet file and attribution")
    parser.add_argument("--curated", help="Parquet file for the reference's training data")
    parser.add_argument("--large", help="folder for the tar shards of all sets")
    parser.add_argument("--size", type=int, default=32, help="edge of the pictures (default 32)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that render (default 2)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
