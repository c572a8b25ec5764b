"""mAP of the demo at every length: what ``admth-train evaluate runs/demo`` measured."""

from __future__ import annotations

import json
import sys

from _harness import Figure, report, require_demo_run


def main() -> None:
    """Read the demo's evaluation."""
    path = require_demo_run() / "evaluation.json"
    if not path.is_file():
        sys.exit("error: runs/demo holds no evaluation.json: run  make demo  first")
    evaluation = json.loads(path.read_text())
    maps = {length: metrics["map"]["all"] for length, metrics in evaluation["metrics"].items()}
    figure = maps["64"]
    report(
        Figure(
            name="mAP@all of the demo at 64 bits",
            value=f"{figure:.4f}",
            target="at least 0.86",
            met=figure >= 0.86,
            details={"mAP@all": maps, "protocol": evaluation["protocol"]},
        )
    )


if __name__ == "__main__":
    main()
