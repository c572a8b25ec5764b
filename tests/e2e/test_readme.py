"""The commands of README.md do what it says: its marked blocks run in order, in one folder, as a reader would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _rooms import COMMANDS, ONE_THREAD, REPOSITORY

MARKED = re.compile(r"<!-- run -->\n```(sh|python)\n(.*?)```", re.DOTALL)
ANY_BLOCK = re.compile(r"^```(\w+)$", re.MULTILINE)
README = REPOSITORY / "README.md"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Lay out what the blocks use: the examples, and ``.venv`` with the environment that runs the tests."""
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    # The activation script of the reader's own environment, whatever that is called on this machine.
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
    return tmp_path


def test_every_block_is_marked_to_run() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(MARKED.findall(text)) == len(ANY_BLOCK.findall(text)) >= 2


@pytest.mark.slow
def test_readme_blocks_run(checkout: Path) -> None:
    for language, block in MARKED.findall(README.read_text(encoding="utf-8")):
        words = ["bash", "-euo", "pipefail", "-c", block] if language == "sh" else [sys.executable, "-c", block]
        done = subprocess.run(
            words, cwd=checkout, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    assert (checkout / "runs/first/model.onnx").is_file()
    assert (checkout / "runs/first/codes.parquet").is_file()


def test_readme_lists_every_command_and_extra() -> None:
    text = README.read_text(encoding="utf-8")
    commands = set(re.findall(r"^\| `(admth-\w+(?: \w+)?)` \|", text, re.MULTILINE))
    found = set()
    for program, module in COMMANDS.items():
        # A program of one command, such as admth-calibrate, has no names of commands.
        code = f"import typer, {module}.cli as cli; print(*getattr(typer.main.get_command(cli.app), 'commands', ''))"
        listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        found |= {f"{program} {name}" for name in listed.split()} or {program}
    assert commands == found
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w[\w-]*) = \[", section, re.MULTILINE))
    table = text.split("## Installing")[1]
    assert set(re.findall(r"^\| `(\w[\w-]*)` \|", table, re.MULTILINE)) == extras
