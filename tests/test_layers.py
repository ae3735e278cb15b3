"""The rooms keep their places: imports go downward, and some names belong to one room alone.

pytest tests/test_layers.py
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jest_stream"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each row may import the rows above it, and its own room if it is a folder. Rooms of one row never
# import each other.
LAYERS = [
    {"errors", "randomness"},
    {"types"},
    {"config", "workers"},
    {"storage", "views", "scoring", "selection", "metrics"},
    {"sources"},
    {"reference_cache"},
    {"pipeline"},
    {"dataset"},
    {"__init__", "testing", "demo"},
    {"cli"},
]

# Only the named modules or rooms may mention these names.
ONLY_IN = {
    "multiprocessing": {"workers"},
    "subprocess": set(),
    "threading": {"sources/read_task.py", "workers/watch.py", "storage"},
    "torch.distributed": {"pipeline/distributed.py"},
    "torch.cuda.Stream": {"pipeline/device/streams.py"},
    "torch.cuda.Event": {"pipeline/device/streams.py"},
    "torch.cuda.stream": {"pipeline/device/streams.py"},
    "torch.cuda.current_stream": {"pipeline/device/streams.py"},
    "record_stream": set(),
    "webdataset": {"sources", "demo"},
    "datasets": {"sources"},
    "open_clip": {"scoring/named_reference.py"},
    "timm": {"scoring/resampling.py"},
    "transformers": set(),
    "pickle": {"workers/transport.py"},
    "torch.multinomial": set(),
    "torch.save": {"testing"},
    "torch.load": {"testing"},
    "open": {"storage", "demo"},
}


def layer_of(module: str) -> int:
    """The row of `jest_stream.sources.tar`, or of `sources/tar.py`."""
    room = module.removeprefix("jest_stream.").split(".")[0]
    return next(i for i, row in enumerate(LAYERS) if room in row)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports_of(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            module = node.module or ""
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def mentions_of(tree: ast.AST) -> set[str]:
    names = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)}
    return names | imports_of(tree)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downward(path: Path) -> None:
    mine = room_of(path)
    for name in imports_of(ast.parse(path.read_text())):
        if not name.startswith("jest_stream."):
            continue
        theirs = name.split(".")[1]
        if theirs == mine and (PACKAGE / mine).is_dir():
            continue
        assert layer_of(f"jest_stream.{theirs}") < layer_of(f"jest_stream.{mine}"), (
            f"{name_of(path)} imports {name}, which is not below it"
        )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_belongs_to_one_room_stays_there(path: Path) -> None:
    mentioned = mentions_of(ast.parse(path.read_text()))
    for word, rooms in ONLY_IN.items():
        if {name_of(path), room_of(path)} & rooms:
            continue
        guilty = [
            name
            for name in mentioned
            if name == word or name.startswith(word + ".") or name.endswith("." + word)
        ]
        guilty = [name for name in guilty if not (word == "open" and "." in name)]
        assert not guilty, f"{name_of(path)} mentions {guilty}; only {rooms or 'nobody'} may"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_name_their_arguments_and_say_what_they_do(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            where = f"{name_of(path)}:{node.lineno} {node.name}"
            assert node.args.kwarg is None, f"{where} takes **{node.args.kwarg.arg}"
            is_public = not node.name.startswith("_") and node.name != "forward"
            assert not is_public or ast.get_docstring(node), f"{where} has no docstring"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} has no docstring"


def test_the_layers_name_every_module_and_no_other() -> None:
    assert {room_of(path) for path in MODULES} == set().union(*LAYERS)


def door_of(module: str) -> str:
    """The package that hands out what a module defines: its room, or a room within that room."""
    parts = module.split(".")
    folders = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return [name for name in folders if ROOT.joinpath(*name.split(".")).is_dir()][-1]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_is_entered_by_its_door(path: Path) -> None:
    """From outside a folder, only what its `__init__` gives; `a.b` is outside of `a.b.c`."""
    mine = module_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        module = getattr(node, "module", None) or ""
        if not isinstance(node, ast.ImportFrom) or not module.startswith("jest_stream"):
            continue
        door = door_of(module)
        is_inside = door == "jest_stream" or mine == door or mine.startswith(door + ".")
        assert is_inside or module == door, (
            f"{name_of(path)}:{node.lineno} imports from {module}; ask {door} for it"
        )


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {module_of(path): path for path in MODULES}
    imported: dict[str, set[str]] = {}
    for name, path in modules.items():
        # `from a import b` reads the file a/b.py if there is one, else a/__init__.py.
        found = imports_of(ast.parse(path.read_text()))
        imported[name] = {it if it in modules else it.rpartition(".")[0] for it in found}
        imported[name] &= modules.keys() - {name}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in imported[name]:
                visit(target, (*way, name))
            done.add(name)

    for name in imported:
        visit(name, ())
