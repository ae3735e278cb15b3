"""The command line says what it does, and its exit status tells whether it did it.

pytest tests/test_cli.py
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jest_stream.cli import main


def test_help_shows_the_commands_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    shown = capsys.readouterr().out
    assert "jest-stream demo --steps" in shown
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


def test_ctrl_c_is_status_130_and_leaves_no_traceback(tmp_path: Path) -> None:
    program = (  # a shell's background jobs ignore Ctrl-C, and so do their children
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from jest_stream.cli import main; raise SystemExit(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, "demo", "--out", str(tmp_path / "out")],
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
