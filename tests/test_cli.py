"""The command line says what it does, and its exit status tells whether it did it.

pytest tests/test_cli.py
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.leaks import no_leaks  # noqa: F401
from support.shards import write_shards

from jest_stream import TarSource
from jest_stream.cli import main

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_help_shows_the_commands_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["demo", "--help"], ["index", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    shown = capsys.readouterr().out
    assert "jest-stream demo --steps" in shown
    assert "jest-stream index" in shown
    for option in ("--steps", "--seed", "--out", "--device", "--filter-ratio"):
        assert option in shown


@pytest.mark.parametrize("arguments", [[], ["train"], ["demo", "--steps", "many"]])
def test_a_wrong_command_line_is_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_an_error_is_status_1_with_its_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--filter-ratio", "1.0", "--out", str(tmp_path)]) == 1
    assert "filter_ratio must be in [0, 1), got 1.0" in capsys.readouterr().err


def test_an_index_is_a_source_that_knows_its_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path, num_shards=3, examples_per_shard=5)
    manifest = tmp_path / "sizes.json"
    assert main(["index", str(tmp_path / "*.tar"), "--out", str(manifest)]) == 0
    assert "3 shards, 15 examples" in capsys.readouterr().out
    assert TarSource(manifest).num_examples == [5, 5, 5]


def test_an_index_of_a_broken_shard_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shard,) = map(Path, write_shards(tmp_path, num_shards=1, examples_per_shard=5))
    shard.write_bytes(shard.read_bytes()[:3000])
    manifest = tmp_path / "sizes.json"
    assert main(["index", str(shard), "--out", str(manifest)]) == 1
    assert "was cut off" in capsys.readouterr().err
    assert not manifest.exists()


def test_ctrl_c_is_status_130_and_leaves_no_traceback(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "jest_stream.cli", "demo", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()  # it has begun
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
