"""The public names of the packages are those that were agreed on, in public_api.txt."""

from __future__ import annotations

from pathlib import Path

from _rooms import ROOMS, python

SNAPSHOT = Path(__file__).with_name("public_api.txt")
HEADER = "# The public names of each package. A change here is a change of the interface: say it in CHANGELOG.md."
LISTING = f"""
import importlib
print({HEADER!r})
for room in {list(ROOMS)!r}:
    package = importlib.import_module(room)
    for name in sorted(getattr(package, "__all__", [])):
        print(f"{{room}}.{{name}}")
"""


def test_public_names_are_the_agreed_ones() -> None:
    assert python(LISTING) == SNAPSHOT.read_text(encoding="utf-8"), (
        "public names changed: if that is meant, say it in CHANGELOG.md and write the snapshot anew with "
        "`python tests/e2e/test_public_api.py` from the repository's root"
    )


def test_every_public_name_can_be_imported() -> None:
    python(
        "import importlib\n"
        f"for room in {list(ROOMS)!r}:\n"
        "    package = importlib.import_module(room)\n"
        "    for name in getattr(package, '__all__', []):\n"
        "        assert getattr(package, name) is not None, (room, name)\n"
        "        assert name in dir(package), (room, name)\n"
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    for room in ROOMS:
        printed = python(
            f"import {room}\ntry:\n    {room}.no_such_name\nexcept AttributeError as error:\n    print(error)"
        )
        assert "no_such_name" in printed


if __name__ == "__main__":
    SNAPSHOT.write_text(python(LISTING), encoding="utf-8")
