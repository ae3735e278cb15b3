"""Tests of errors fail if they leave anything behind, and no such test goes without the check.

pytest tests/test_leaks.py
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import leaks
from support.leaks import nothing_left_behind

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.rglob("test_*.py"))

# These names open files, connections or processes. Tests of pure computation need no check.
OPENS = (
    "JESTDataset TarSource IterableSource HuggingFaceSource open_source sources storage testing "
    "ReferenceCache reference_cache dataset pipeline workers demo cli"
).split()


def opens(tree: ast.Module) -> bool:
    """Whether a module imports anything of ours that opens something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms = [name.split(".")[1] for name in names if name.startswith("jest_stream.")]
        if "jest_stream" in names or set(rooms) & set(OPENS):
            return True
    return False


def unchecked(tree: ast.Module) -> list[str]:
    """The tests that expect an error and do not look for what it leaves behind."""
    top = [ast.unparse(node) for node in tree.body if not isinstance(node, ast.FunctionDef)]
    if any("pytestmark" in text and "no_leaks" in text for text in top):
        return []
    if any("import" in text and "nothing_survives" in text for text in top):  # used by itself
        return []
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [
        test.name
        for test in tests
        if "pytest.raises(" in (text := ast.unparse(test))
        and "no_leaks" not in text
        and "nothing_left_behind" not in text
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_every_test_of_an_error_in_reading_looks_for_what_is_left(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not (opens(tree) and unchecked(tree)), (
        f"{', '.join(unchecked(tree))} of {path.name} expect errors of what opens files or "
        'processes. Add: from support.leaks import no_leaks; pytestmark = usefixtures("no_leaks")'
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import jest_stream", []),
        ("from jest_stream.selection import select_jointly\nCODE", []),
        ("from jest_stream import JESTDataset\nCODE", ["test_it"]),
        ("from jest_stream.storage import Storage\nCODE", ["test_it"]),
        ('from jest_stream import TarSource\npytestmark = usefixtures("no_leaks")\nCODE', []),
        ("from jest_stream import TarSource\nfrom remote import nothing_survives\nCODE", []),
        ('from jest_stream import TarSource\n@pytest.mark.usefixtures("no_leaks")\nCODE', []),
    ],
)
def test_the_rule_finds_what_it_is_for(text: str, found: list[str]) -> None:
    code = "def test_it():\n    with pytest.raises(ValueError):\n        pass\n"
    tree = ast.parse(text.replace("CODE", code))
    assert (unchecked(tree) if opens(tree) else []) == found


def test_a_process_a_thread_and_a_descriptor_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "_PATIENCE_S", 0.2)
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left over")
    with pytest.raises(AssertionError, match="left behind: .*left over"):
        with nothing_left_behind():
            thread.start()
    end.set()
    thread.join()
    with pytest.raises(AssertionError, match="left behind: .*psutil.Process"):
        with nothing_left_behind():
            process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process.communicate()
    with pytest.raises(AssertionError, match="left behind: .*/dev/null"):
        with nothing_left_behind():
            descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)


def test_what_ends_by_itself_is_waited_for() -> None:
    begin = threading.Event()
    with nothing_left_behind():
        threading.Thread(target=begin.wait).start()
        threading.Timer(0.1, begin.set).start()
