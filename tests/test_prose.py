"""Docstrings and comments are plain English: sentences have a subject and hold no riddles.

pytest tests/test_prose.py
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules_of(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


MODULES = modules_of("jest_stream", "examples", "tests")

# A sentence starts where a text, a list item or an argument's description does, or after another.
RIDDLE = re.compile(r"(?:^|[.!?:]\s+|^[-*\d.]+\s+)(what|which|who|whose|whoever|whatever)\b", re.I)
# Two idioms are plain English. A copy of weights is "three steps behind". A process that ends may
# "leave files behind", which is a place: where it ran. At most three words stand between the two.
LEFT = re.compile(r"\b(?:leave|leaves|left|leaving)\s+(?:[\w'`.-]+\s+){0,3}behind\b", re.I)
BEHIND = re.compile(r"(?<!steps )\bbehind\b", re.I)
WHAT = re.compile(r"\bwhat\b", re.I)
# In the projects that this one takes as models the word stands 5 times in 61,000 words.
MOST_WHATS_PER_1000_WORDS = 0.1


def docstrings_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every string that stands alone: docstrings, and those under fields."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.lineno, node.value.value


def comments_of(text: str) -> Iterator[tuple[int, str]]:
    """Every comment; consecutive lines that hold nothing else are one."""
    start, lines, last = 0, list[str](), -1
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or token.string.startswith(("# type:", "# noqa")):
            continue
        row, is_alone = token.start[0], not token.line[: token.start[1]].strip()
        if lines and not (is_alone and row == last + 1):
            yield start, "\n".join(lines)
            lines = []
        start = start if lines else row
        lines.append(token.string.lstrip("# "))
        last = row
    if lines:
        yield start, "\n".join(lines)


def prose_of(path: Path) -> list[tuple[int, str]]:
    """Docstrings and comments of a file, each with its line; without code and literal blocks."""
    text = path.read_text()
    found = [*docstrings_of(ast.parse(text)), *comments_of(text)]
    return [(line, re.sub(r"``?[^`]*``?", "`...`", prose)) for line, prose in found]


def paragraphs_of(prose: str) -> Iterator[str]:
    """Paragraphs and list items, each on one line."""
    for part in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)|\n(?=\s+\w+: )", prose):
        yield " ".join(part.split())


def tells_of_behind(prose: str) -> bool:
    """Whether the word is used outside the two idioms."""
    return bool(BEHIND.search(LEFT.sub("", " ".join(prose.split()))))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_sentence_begins_with_what_which_or_who(path: Path) -> None:
    riddles = [
        f"{name_of(path)}:{line}: {part[max(0, found.start() - 20) : found.end() + 50]}"
        for line, prose in prose_of(path)
        for part in paragraphs_of(prose)
        for found in RIDDLE.finditer(part)
    ]
    assert not riddles, "\n".join(riddles)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_behind_is_a_place_and_not_a_time(path: Path) -> None:
    """Of a stream it is "after" or "next"; a copy of weights may be some steps behind."""
    found = [
        f"{name_of(path)}:{line}: {' '.join(prose.split())[:90]}"
        for line, prose in prose_of(path)
        if tells_of_behind(prose)
    ]
    assert not found, "\n".join(found)


def test_things_are_called_by_their_nouns() -> None:
    """ "What was chosen" are the chosen rows."""
    modules = modules_of("jest_stream", "examples")
    prose = [text for path in modules for _, text in prose_of(path)]
    num_words = sum(len(text.split()) for text in prose)
    num_whats = sum(len(WHAT.findall(text)) for text in prose)
    assert 1000 * num_whats <= MOST_WHATS_PER_1000_WORDS * num_words, f"{num_whats} of {num_words}"


PACKAGE_MODULES = [path for path in MODULES if path.is_relative_to(ROOT / "jest_stream")]


@pytest.mark.parametrize("path", PACKAGE_MODULES, ids=name_of)
def test_every_module_begins_with_a_verb(path: Path) -> None:
    """The module is the subject: `Reads tar shards: ...`, `Finds the files that ...`."""
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split()[:2]
    verb = first[1] if first[0] == "jest_stream" else first[0]
    assert re.fullmatch(r"[A-Za-z]+s,?", verb), f"{name_of(path)} begins with {' '.join(first)!r}"


@pytest.mark.parametrize("path", PACKAGE_MODULES, ids=name_of)
def test_no_function_or_class_begins_with_a_subordinate_clause(path: Path) -> None:
    """ "Tells whether the time is up" is a sentence, "Whether the time is up" is none."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    wrong = [
        f"{name_of(path)}:{node.lineno}: {text[:60]}"
        for node in nodes
        if (text := ast.get_docstring(node) or "").startswith(("Whether ", "Where ", "How "))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rules_see_what_they_should() -> None:
    """The three rules find these, and only these."""
    bad = ["What is read.", "Reads.\n\nWhich of them.", "Args:\n  a: who asks.", "- What else."]
    good = ["Tells what is read.", "`what`: a name.", "The reader that knows who asks."]
    for text in bad:
        assert any(RIDDLE.search(part) for part in paragraphs_of(text)), text
    for text in good:
        assert not any(
            RIDDLE.search(part) for part in paragraphs_of(re.sub(r"`[^`]*`", "`...`", text))
        ), text
    for text in ["the batch behind it", "It is left.\nBehind it stands another.", "leaves, behind"]:
        assert tells_of_behind(text), text
    for text in [
        "three steps behind",
        "leaves no file behind",
        "leave them\nbehind",
        "left behind",
    ]:
        assert not tells_of_behind(text), text
