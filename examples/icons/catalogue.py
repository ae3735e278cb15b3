"""Reads the installed npm packages: icons as SVG, each with a caption, set, category, licence.

`@iconify/json` gives the drawings and names of some 240 sets; CLDR gives emoji their names and
keywords; four sets bring tags in packages of their own. Nothing is rendered here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PERMISSIVE = {
    "Apache-2.0", "BSD-3-Clause", "CC-BY-3.0", "CC-BY-4.0", "CC0-1.0", "ISC", "MIT",
    "Unlicense",
}  # fmt: skip
FAMILIES = {
    "Emoji": "emoji", "Logos": "logo", "Programming": "logo", "Flags / Maps": "map",
    "Thematic": "thematic",
}  # fmt: skip
EMOJI_SETS = {"fluent-emoji"}  # emoji that the collection lists under no category
MAX_KEYWORDS = 4


@dataclass(frozen=True, kw_only=True)
class IconSet:
    """A set of drawings by one author under one licence."""

    prefix: str
    name: str
    author: str
    url: str
    licence: str
    family: str
    is_colour: bool

    @property
    def is_permissive(self) -> bool:
        """Whether its drawings may be passed on without terms for the works that use them."""
        return self.licence in PERMISSIVE


@dataclass(frozen=True, kw_only=True)
class Icon:
    """One drawing and the name that its authors gave it."""

    key: str
    text: str
    category: str
    svg: str
    set: IconSet
    has_skin_tone: bool


def read_icon_sets(npm: Path) -> dict[str, IconSet]:
    """Returns every icon set of the collection by its prefix."""
    sets = {}
    for prefix, info in _read(npm / "@iconify/json/collections.json").items():
        licence, author = info["license"], info.get("author", {})
        family = FAMILIES.get(info.get("category", ""), "interface")
        sets[prefix] = IconSet(
            prefix=prefix,
            name=info["name"],
            author=author.get("name", "unknown"),
            url=author.get("url") or licence.get("url", ""),
            licence=licence.get("spdx") or licence["title"],
            family="emoji" if prefix in EMOJI_SETS else family,
            is_colour=bool(info.get("palette")),
        )
    return sets


class Captions:
    """Names and keywords from outside the icon sets: CLDR for emoji, tags for four sets."""

    def __init__(self, npm: Path) -> None:
        self._emoji: dict[str, tuple[str, list[str]]] = {}
        for package, kind in (("derived-full", "annotationsDerived"), ("full", "annotations")):
            path = npm / f"cldr-annotations-{package}" / kind / "en" / "annotations.json"
            for character, entry in _read(path)[kind]["annotations"].items():
                name = entry.get("tts", [""])[0].lower()
                self._emoji[_bare(character)] = (name, entry.get("default", []))
        self._by_slug = {_slug(name): name_and_words for name, name_and_words in
                         ((entry[0], entry) for entry in self._emoji.values())}  # fmt: skip
        self._tags = _icon_tags(npm)

    def emoji(self, name: str, characters: str | None) -> str:
        """Returns the caption of an emoji, by its characters or else by its name."""
        fallback: tuple[str, list[str]] = (_words(name), [])
        known = self._emoji.get(_bare(characters)) if characters else None
        return _caption(*(known or self._by_slug.get(name, fallback)))

    def icon(self, prefix: str, name: str) -> str:
        """Returns the caption of an icon: its name, and its tags where the set has some."""
        return _caption(_words(name), self._tags.get((prefix, name), []))


def read_icons(npm: Path, icon_set: IconSet, captions: Captions) -> list[Icon]:
    """Returns the icons of one set, sorted by name, without the hidden (withdrawn) ones."""
    data = _read(npm / "@iconify/json/json" / f"{icon_set.prefix}.json")
    characters = {
        name: "".join(chr(int(part, 16)) for part in points.split("-"))
        for points, name in sorted(data.get("chars", {}).items())
    }
    categories = {
        name: category for category, names in data.get("categories", {}).items() for name in names
    }
    icons = []
    for name, drawing in sorted(data["icons"].items()):
        if drawing.get("hidden"):
            continue
        is_emoji, shown = icon_set.family == "emoji", characters.get(name)
        if is_emoji:
            text = captions.emoji(name, shown)
        else:
            text = captions.icon(icon_set.prefix, name)
        icons.append(
            Icon(
                key=f"{icon_set.prefix}/{name}",
                text=text,
                category=categories.get(name) or icon_set.family,
                svg=_svg(drawing, data),
                set=icon_set,
                has_skin_tone=is_emoji and _has_skin_tone(name, shown),
            )
        )
    return icons


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _bare(characters: str) -> str:
    """CLDR keys emoji without variation selectors."""
    return characters.replace("\ufe0f", "")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _words(name: str) -> str:
    """`fire-engine` -> `fire engine`."""
    return re.sub(r"[-_\s]+", " ", name).strip().lower()


def _caption(name: str, keywords: Iterable[str]) -> str:
    """`fire engine: fire, truck`. Keywords that repeat the name say nothing new."""
    further = [word for word in dict.fromkeys(keywords) if word != name][:MAX_KEYWORDS]
    return f"{name}: {', '.join(further)}" if further else name


def _has_skin_tone(name: str, characters: str | None) -> bool:
    toned = any(0x1F3FB <= ord(character) <= 0x1F3FF for character in characters or "")
    return toned or bool(re.search(r"(^|-)(medium-)?(light|dark|medium)(-skin-tone)?$", name))


def _svg(drawing: dict[str, Any], data: dict[str, Any]) -> str:
    """Returns a whole SVG document; drawings of one colour become nearly black."""
    box = {
        field: drawing.get(field, data.get(field, default))
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    }
    body: str = drawing["body"]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}" '
        'color="#222">'.format(**box)
        + body
        + "</svg>"
    )


def _icon_tags(npm: Path) -> dict[tuple[str, str], list[str]]:
    """Returns the tags by (icon set, icon) that four sets give in packages of their own."""
    tags: dict[tuple[str, str], list[str]] = {}
    for icon in _read(npm / "@mdi/svg/meta.json"):
        terms = icon["aliases"] + [tag.replace("/", " ") for tag in icon["tags"]]
        tags["mdi", icon["name"]] = [_words(term) for term in terms]
    for name, icon in _read(npm / "@tabler/icons/icons.json").items():
        tags["tabler", name] = [_words(str(tag)) for tag in icon["tags"]]
    for name, terms in _read(npm / "lucide-static/tags.json").items():
        tags["lucide", name] = terms
    families = "@fortawesome/fontawesome-free/metadata/icon-families.json"
    for name, icon in _read(npm / families).items():
        terms = icon.get("search", {}).get("terms", [])
        tags["fa7-solid", name] = [_words(str(term)) for term in terms]
    return tags
