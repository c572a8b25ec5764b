"""What the repository's files must be: about the project alone, small, and fit for any machine."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from _rooms import REPOSITORY

# Put together here, so that this file does not find itself.
# A home folder of "who" is what tests call a place that does not exist.
PLACES = re.compile(rf"(?<![\w.~<])/(?:{'|'.join(('root', 'tmp', 'work', 'home'))})/(?!who/)\w")
REGISTRIES = tuple(
    f"{name}.org" for name in ("pypi", "pythonhosted", "registry.npmjs", "deb.debian", "download.pytorch")
)
LARGEST = 2 * 2**20


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout, so there is no list of files")
    return [REPOSITORY / name for name in listing.stdout.decode().split("\0") if name and (REPOSITORY / name).is_file()]


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content:
            found.append((path.relative_to(REPOSITORY), content.decode("utf-8")))
    return found


def test_no_file_names_a_place_on_one_machine() -> None:
    wrong = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if PLACES.search(line)
    ]
    assert not wrong


def test_no_file_names_a_package_registry() -> None:
    assert not [f"{path}: {host}" for path, text in texts() for host in REGISTRIES if host in text]


def test_no_file_is_large() -> None:
    # The training images of the demo are 2.1 MB of pictures; everything else stays far below.
    large = {
        str(path.relative_to(REPOSITORY)): path.stat().st_size
        for path in tracked_files()
        if path.stat().st_size > LARGEST and "fashion-mnist-mini" not in path.parts
    }
    assert not large


def test_names_of_test_files_are_unique() -> None:
    names = Counter(path.name for path in (REPOSITORY / "tests").rglob("test_*.py"))
    assert len(names) > 10
    assert not [name for name, count in names.items() if count > 1]


def test_markdown_links_lead_somewhere() -> None:
    broken = []
    for path, text in texts():
        if path.suffix != ".md":
            continue
        targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
        local = [target for target in targets if "://" not in target]
        broken += [f"{path}: {target}" for target in local if not (REPOSITORY / path.parent / target).exists()]
    assert not broken


def test_the_version_is_the_same_everywhere() -> None:
    version = re.search(r'= "([^"]+)"', (REPOSITORY / "runtime/admth_runtime/_version.py").read_text(encoding="utf-8"))
    assert version is not None
    assert f"version: {version[1]}\n" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert version[1] in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
