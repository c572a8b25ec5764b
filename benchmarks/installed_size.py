"""Installed size of admth[cpu] against the training environment: every file of both closures of packages."""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution

from _harness import Figure, report
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

RUNTIME_EXTRAS = ("cpu",)
TRAINING_EXTRAS = ("train", "pretrained")


def closure(name: str, extras: tuple[str, ...], found: dict[str, Distribution]) -> None:
    """Collect a distribution and all that it needs, as pip would install them here, into ``found``."""
    key = canonicalize_name(name)
    try:
        package = distribution(name)
    except PackageNotFoundError as error:
        raise SystemExit(f"error: {name} is not installed: run  make install") from error
    if key in found and not extras:
        return
    found[key] = package
    for text in package.requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            closure(requirement.name, tuple(requirement.extras), found)


def megabytes(packages: dict[str, Distribution]) -> dict[str, float]:
    """Return the size on disk of each package in MB, compiled Python files left out."""
    sizes = {}
    for name, package in packages.items():
        paths = [package.locate_file(file) for file in package.files or [] if file.suffix != ".pyc"]
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file()) / 1e6  # type: ignore[union-attr]
    return sizes


def main() -> None:
    """Compare the closures in the environment that runs this."""
    sizes = {}
    for label, extras in (("admth[cpu]", RUNTIME_EXTRAS), ("training", TRAINING_EXTRAS)):
        found: dict[str, Distribution] = {}
        closure("admth", extras, found)
        sizes[label] = megabytes(found)
    runtime, training = sum(sizes["admth[cpu]"].values()), sum(sizes["training"].values())
    report(
        Figure(
            name="installed size of admth[cpu] against the training environment",
            value=f"1/{training / runtime:.1f}",
            target="at most 1/5",
            met=runtime <= training / 5,
            details={
                "admth[cpu], MB": round(runtime, 1),
                f"admth[{','.join(TRAINING_EXTRAS)}], MB": round(training, 1),
                "largest in admth[cpu], MB": _largest(sizes["admth[cpu]"]),
                "largest in training, MB": _largest(sizes["training"]),
            },
        )
    )


def _largest(sizes: dict[str, float]) -> dict[str, float]:
    ranked = sorted(sizes.items(), key=lambda item: -item[1])[:6]
    return {name: round(size, 1) for name, size in ranked}


if __name__ == "__main__":
    main()
