"""The promises around the code: lint, types, imports, examples, README.

pytest tests/test_project.py
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub_server import HubServer
from support.s3_server import S3Server
from support.shards import write_shards

import jest_stream

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LONG = {
    "flexi_training.py",
    "resume_after_kill.py",
    "small_proxy.py",
    "train_open_clip.py",
    "train_open_clip_main.py",
}
EXAMPLES = [
    pytest.param(path, marks=[pytest.mark.slow] if path.name in LONG else [])
    for path in sorted((ROOT / "examples").glob("*.py"))
]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(*command: str, cwd: Path = ROOT, timeout_s: float = 300) -> str:
    """Runs a command to its end; fails with its output if it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={"HF_HUB_OFFLINE": "1", **os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_ruff_finds_nothing() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


@pytest.mark.timeout(400)
def test_mypy_strict_finds_nothing() -> None:
    run(sys.executable, "-m", "mypy", timeout_s=390)


def test_importing_the_package_imports_nothing_optional_or_heavy() -> None:
    heavy = "open_clip timm transformers torchvision webdataset datasets pyarrow matplotlib PIL"
    program = (
        "import sys, torch; before = set(sys.modules); import jest_stream;"
        f"print(sorted(set('{heavy}'.split()) & (set(sys.modules) - before)))"
    )
    assert run(sys.executable, "-c", program).strip() == "[]"


def test_the_public_names_are_sorted_and_there() -> None:
    assert list(jest_stream.__all__) == sorted(jest_stream.__all__)
    for name in jest_stream.__all__:
        assert getattr(jest_stream, name).__doc__, name


def test_the_top_level_holds_what_was_laid_down() -> None:
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    shown -= {path.name for path in ROOT.glob("*.egg-info")} | {"build", "jest_demo"}
    assert shown == {"jest_stream", "tests", "examples", "pyproject.toml", "README.md", "LICENSE"}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_runs(
    path: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path.name == "stream_from_s3.py":
        server: S3Server = request.getfixturevalue("s3")
        bucket = server.put_files(write_shards(tmp_path / "pairs"))
        for name, value in {**server.environment, "PAIRS": f"{bucket}/*.tar"}.items():
            monkeypatch.setenv(name, value)
    if path.name == "stream_from_hub.py":
        hub: HubServer = request.getfixturevalue("hub")
        files = map(Path, write_shards(tmp_path / "pairs"))
        hub.put("acme/pairs", {f"train-{file.name}": file.read_bytes() for file in files})
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HUB_DATASET", "acme/pairs")
    assert run(sys.executable, str(path), cwd=tmp_path).strip()


@pytest.mark.filterwarnings("default")  # as for a user
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_of_the_readme_runs(block: str, tmp_path: Path) -> None:
    """Blocks run as they stand, each in a folder with real shards called pairs-*.tar.

    In a fork, which has imported torch already.
    """
    for path in map(Path, write_shards(tmp_path, num_shards=4, examples_per_shard=32)):
        path.rename(path.with_name(f"pairs-{path.name}"))

    def run_block() -> None:
        os.chdir(tmp_path)
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})

    process = multiprocessing.get_context("fork").Process(target=run_block)
    process.start()
    process.join(100)
    assert process.exitcode == 0
    process.close()


def test_the_readme_names_every_module() -> None:
    tree = README[README.index("```text") :]
    for path in (ROOT / "jest_stream").rglob("*.py"):
        if path.name != "__init__.py":
            assert f"{path.name} " in tree, f"{path.name} is missing in the README's tree"


def test_the_two_set_up_commands_stand_alone() -> None:
    commands = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    assert 'pip install -e ".[demo]" && jest-stream demo\n' in commands
    assert 'pip install -e ".[test]" && pytest\n' in commands
