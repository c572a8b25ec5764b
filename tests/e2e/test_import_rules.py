"""The arrows between the rooms: runtime <- training <- export and runtime <- calibration <- export.

The runtime does without PyTorch and onnx, and calibration without PyTorch.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _rooms import COMMANDS, ROOMS, modules_of, python

FORBIDDEN = {
    "admth_runtime": {
        "torch",
        "torchvision",
        "onnx",
        "onnxscript",
        "admth_training",
        "admth_calibration",
        "admth_export",
    },
    "admth_training": {"onnx", "onnxscript", "onnxruntime", "admth_calibration", "admth_export"},
    "admth_calibration": {"torch", "torchvision", "onnxscript", "admth_training", "admth_export"},
    "admth_export": set(),
}
# From the repository's root these are empty namespace packages: an import that seems to work and gives nothing.
FOLDERS = {"runtime", "training", "export", "calibration"}
BLOCKED = (
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "safetensors",
    "admth_training",
    "admth_calibration",
    "admth_export",
)


def imported_names(path: Path, package: str) -> Iterator[tuple[str, int]]:
    """Yield the absolute name and line of every import in a file: nested, conditional and by string alike."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "require") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node.lineno


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_what_it_may_not(room: str) -> None:
    files = sorted(ROOMS[room].rglob("*.py"))
    assert files
    wrong = []
    for path in files:
        package = ".".join([room, *path.relative_to(ROOMS[room]).parent.parts])
        for name, line in imported_names(path, package):
            if name.split(".")[0] in FORBIDDEN[room] | FOLDERS:
                wrong.append(f"{path.name}:{line} imports {name}")
    assert not wrong


def test_the_scan_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "import a\nfrom b.c import d\nfrom . import e\nfrom ..f import g\n"
        "if True:\n    import h.i\ndef k():\n    import importlib\n    importlib.import_module('l.m')\n"
        "require('n', extra='x')\n"
    )
    names = [name for name, _ in imported_names(path, "room.sub")]
    assert sorted(names) == ["a", "b.c", "h.i", "importlib", "l.m", "n", "room.f", "room.sub"]


def test_every_runtime_module_imports_where_the_rest_is_blocked() -> None:
    modules = [name for name in modules_of("admth_runtime") if not name.endswith("__main__")]
    assert "admth_runtime.runtime" in modules
    python(
        "import importlib, sys\n"
        f"for name in {BLOCKED!r}: sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"loaded = [name for name in {BLOCKED!r} if sys.modules[name] is not None]\n"
        "assert not loaded, loaded\n"
    )


def test_every_module_says_what_is_public() -> None:
    """``__all__`` is there, and names nothing twice; that the names exist is ruff's business."""
    for room, folder in ROOMS.items():
        for path in sorted(folder.rglob("*.py")):
            if path.name in ("__main__.py", "_version.py"):  # hatch reads the latter as it is
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assigned = {
                getattr(target, "id", ""): node.value
                for node in tree.body
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            }
            if path.name == "__init__.py" and len(tree.body) <= 1:
                continue
            assert "__all__" in assigned, f"{room}: {path.name} has no __all__"
            names = ast.literal_eval(assigned["__all__"])
            assert len(set(names)) == len(names), f"{room}: {path.name} repeats a name in __all__"


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_package_loads_nothing_heavy(room: str) -> None:
    heavy = ("torch", "onnx", "onnxruntime", "pyarrow", "matplotlib", "typer")
    loaded = python(f"import sys, {room}; print([name for name in {heavy!r} if name in sys.modules])")
    assert loaded.strip() == "[]"


HELP = """
import runpy, sys
sys.argv = [{module!r}, *{arguments!r}, "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print("LOADED", [name for name in {heavy!r} if name in sys.modules])
"""


def subcommands_of(module: str) -> list[str]:
    """List the subcommands of a program, from its typer application; a program with one command has none."""
    return python(
        f"import typer, {module}.cli as cli\nprint(*sorted(getattr(typer.main.get_command(cli.app), 'commands', {{}})))"
    ).split()


@pytest.mark.parametrize("module", COMMANDS.values())
def test_help_loads_no_heavy_package(module: str) -> None:
    heavy = ("torch", "onnxruntime", "onnx", "numpy", "PIL", "pyarrow", "matplotlib", "jinja2")
    commands = subcommands_of(module)
    assert commands or module == "admth_calibration"
    for arguments in ([], *([name] for name in commands)):
        printed = python(HELP.format(module=module, arguments=arguments, heavy=heavy))
        assert "Usage:" in printed
        assert printed.splitlines()[-1] == "LOADED []", f"{module} {arguments} --help loads {printed.splitlines()[-1]}"


def test_import_mode_is_what_the_rooms_need() -> None:
    """The rooms come from this checkout, not from some other installation."""
    for room, folder in ROOMS.items():
        found = python(f"import {room}; print({room}.__file__)").strip()
        assert Path(found).resolve() == folder / "__init__.py", sys.path
