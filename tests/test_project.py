"""The project keeps the promises around its code: lint, types, imports, examples, READMEs.

pytest tests/test_project.py
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.hub_server import HubServer
from support.leaks import no_leaks  # noqa: F401
from support.s3_server import S3Server
from support.shards import write_shards

import jest_stream
from jest_stream import JESTDataset, SelectionConfig, cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jest_stream"
README = (ROOT / "README.md").read_text()
PAGES = {
    name: (ROOT / name).read_text()
    for name in (
        "README.md",
        "examples/README.md",
        "jest_stream/README.md",
        "tests/benchmarks/README.md",
    )
}
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


def blocks_of(language: str) -> list[pytest.ParameterSet]:
    """The code blocks of all pages, each named by its page and number."""
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name, page in PAGES.items()
        for number, block in enumerate(re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL))
    ]


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
    heavy = (
        "open_clip timm transformers torchvision webdataset datasets pyarrow matplotlib PIL "
        "huggingface_hub fsspec aiohttp"
    )
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
    files = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    assert shown == {"jest_stream", "tests", "examples"} | files


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
@pytest.mark.parametrize("block", blocks_of("python"))
def test_every_python_block_runs(block: str, tmp_path: Path) -> None:
    """Blocks run as they stand, each in a folder with real shards called pairs-*.tar.

    In a fork, which has imported torch already.
    """
    for path in map(Path, write_shards(tmp_path, num_shards=4, examples_per_shard=32)):
        path.rename(path.with_name(f"pairs-{path.name}"))
    weights = {"module.logit_scale": torch.zeros(())}
    torch.save({"epoch": 32, "state_dict": weights}, tmp_path / "epoch_32.pt")  # as open_clip_train

    def run_block() -> None:
        os.chdir(tmp_path)
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})

    process = multiprocessing.get_context("fork").Process(target=run_block)
    process.start()
    process.join(100)
    assert process.exitcode == 0
    process.close()


@pytest.mark.parametrize("block", blocks_of("bash"))
def test_every_command_of_a_shell_block_exists(
    block: str,
    capsys: pytest.CaptureFixture[str],
    no_leaks: None,  # noqa: F811
) -> None:
    """Of ours: `--help` knows the command, and names each of the options given."""
    lines = block.replace("\\\n", " ").replace("&&", "\n").splitlines()
    for program, *arguments in filter(None, map(shlex.split, lines)):
        assert program in ("jest-stream", "pip", "pytest")
        if program == "jest-stream":
            with pytest.raises(SystemExit) as ended:
                cli.main([arguments[0], "--help"])
            assert ended.value.code == 0
            options = {argument for argument in arguments if argument.startswith("--")}
            assert options <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_somewhere(name: str) -> None:
    """To a file of the repository, and to a heading of it where one is named."""
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        if not target.startswith("https://"):
            path, _, heading = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), f"{name} links {target}"
            assert not heading or heading in headings_of(file.read_text()), f"{name}: {target}"


def headings_of(page: str) -> set[str]:
    """The names by which headings are linked, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_guide_names_every_metric() -> None:
    guide = PAGES["examples/README.md"]
    dataset = JESTDataset(
        [(torch.zeros(2), torch.zeros(2))],
        selection=SelectionConfig(method="uniform"),
        batch_size=1,
    )
    with dataset:
        for name in dataset.metrics():
            assert f"`{name}`" in guide, f"{name} is missing in the guide"


def test_the_first_page_is_short() -> None:
    assert README.count("\n") <= 250


def test_the_tree_names_every_module() -> None:
    """In the README of the code, each with a word on it, and no file that is gone."""
    page = PAGES["jest_stream/README.md"]
    tree = re.findall(r"^( +)([\w.]+/?)( .*)?$", page[page.rindex("```text") :], re.MULTILINE)
    named, folders = set(), {4: PACKAGE}
    for indent, name, about in tree:
        path = folders[len(indent)] / name
        named.add(path)
        if name.endswith("/"):
            folders[len(indent) + 4] = path
        else:
            assert about.strip(), f"{name} has no word on it"
    modules = {path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert {path for path in named if path.suffix == ".py"} >= modules
    assert all(path.exists() for path in named)


def test_the_two_set_up_commands_stand_alone() -> None:
    commands = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    assert 'pip install -e ".[demo]" && jest-stream demo\n' in commands
    assert 'pip install -e ".[test]" && pytest\n' in commands
