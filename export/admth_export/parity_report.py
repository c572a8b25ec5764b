"""The report of a parity check: what was compared, under which gate, and what came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from admth_export.candidate_process import EngineFacts
from admth_export.gate import Gate
from admth_export.gate_images import ImageFacts
from admth_export.parity import RetrievalEffect, RunParity
from admth_runtime._version import __version__

__all__ = ["FORMAT_VERSION", "ModelFacts", "ParityReport"]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelFacts:
    """The candidate.

    Attributes:
        file: its file name.
        sha256: SHA-256 of the file, or None where the model failed its export and was never kept.
        bytes: its size.
        precision: as its manifest says.
        target: as its manifest says.
        checkpoint_sha256: SHA-256 of the weights that its manifest names.
    """

    file: str
    sha256: str | None
    bytes: int
    precision: str
    target: str
    checkpoint_sha256: str


@dataclass(frozen=True)
class ParityReport:
    """Sign parity of a candidate with a PyTorch network.

    Attributes:
        model: the candidate.
        checkpoint_sha256: SHA-256 of the weights that the reference was computed with.
        engine: what ran the candidate.
        torch_version: what computed the reference.
        images: which images were compared.
        gate: the limits.
        failures: a line for each limit that is not met.
        runs: the measures for each batch size, the one over all images first.
        retrieval: the effect on retrieval by code length, or None where it was left out.
        reference: which network it is, in a few words.
        against: the same candidate against the network of another run, which no gate judges, or None.
    """

    model: ModelFacts
    checkpoint_sha256: str
    engine: EngineFacts
    torch_version: str
    images: ImageFacts
    gate: Gate
    failures: tuple[str, ...]
    runs: tuple[RunParity, ...]
    retrieval: Mapping[int, RetrievalEffect] | None
    reference: str = "FP32"
    against: ParityReport | None = None

    @property
    def passed(self) -> bool:
        """Whether every limit is met."""
        return not self.failures

    @property
    def flip_count(self) -> int:
        """Flips of all lengths in the run over all images."""
        return sum(len(parity.flips) for parity in self.runs[0].lengths.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "format_version": FORMAT_VERSION,
            "created_by": f"admth {__version__}",
            "passed": self.passed,
            "failures": list(self.failures),
            "gate": self.gate.to_dict(),
            "model": asdict(self.model),
            "checkpoint_sha256": self.checkpoint_sha256,
            "engine": asdict(self.engine),
            "reference": f"PyTorch {self.torch_version}, {self.reference}, on cpu",
            "images": self.images.to_dict(),
            "runs": [run.to_dict() for run in self.runs],
            "retrieval": None
            if self.retrieval is None
            else {str(length): effect.to_dict() for length, effect in self.retrieval.items()},
            "against": None if self.against is None else self.against.to_dict(),
        }

    def summary(self) -> dict[str, Any]:
        """Return the short form that a model's manifest holds."""
        lengths = self.runs[0].lengths
        margins = [parity.max_flip_margin for parity in lengths.values() if parity.max_flip_margin is not None]
        return {
            "passed": self.passed,
            "dataset": self.images.dataset,
            "images": self.images.images,
            "batch_sizes": [run.batch_size for run in self.runs],
            "engine": f"{self.engine.name} {self.engine.version}",
            "device": self.engine.device,
            "noise_threshold": self.gate.noise_threshold,
            "minimum_bit_parity": self.gate.minimum_bit_parity,
            "bit_parity": {str(length): parity.bit_parity for length, parity in lengths.items()},
            "exact_code_rate": {str(length): parity.exact_code_rate for length, parity in lengths.items()},
            "flips": self.flip_count,
            "max_flip_margin": max(margins) if margins else None,
            "max_logit_error": max(parity.max_logit_error for parity in lengths.values()),
            "map_difference": None
            if self.retrieval is None
            else {str(length): effect.difference for length, effect in self.retrieval.items()},
        }

    def table(self) -> str:
        """Return the measures for the console, a line a code length, with what was compared above and notes below."""
        images = self.images
        tau = "none" if self.gate.noise_threshold is None else f"{self.gate.noise_threshold:g}"
        reference = "PyTorch" if self.reference == "FP32" else f"PyTorch ({self.reference})"
        head = (
            f"sign parity with {reference} on {images.images:,} of {images.split_size:,} {images.split} "
            f"images of {images.dataset}, {self.engine}"
        )
        rows = [["bits", "equal bits", "exact codes", "distance mean/max", "flips", "largest |z|", "logit error"]]
        if self.retrieval is not None:
            rows[0] += ["mAP", "change"]
        for length, parity in self.runs[0].lengths.items():
            margin = parity.max_flip_margin
            row = [
                str(length),
                f"{100 * parity.bit_parity:.3f} %",
                f"{100 * parity.exact_code_rate:.2f} %",
                f"{parity.mean_hamming_distance:.4f} / {parity.max_hamming_distance}",
                f"{len(parity.flips):,}",
                "-" if margin is None else f"{margin:.2g}",
                f"{parity.max_logit_error:.2g}",
            ]
            if self.retrieval is not None:
                effect = self.retrieval[length]
                row += [f"{effect.reference_map:.4f}", f"{effect.difference:+.4f}"]
            rows.append(row)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines = [head, lines[0], "-" * len(lines[0]), *lines[1:]]
        others = [
            f"batch {run.batch_size}: {sum(len(parity.flips) for parity in run.lengths.values()):,} flips on "
            f"{run.image_count:,} images"
            for run in self.runs[1:]
        ]
        limits = f"noise threshold {tau}, least equal bits {100 * self.gate.minimum_bit_parity:g} %"
        if self.gate.noise_threshold is None and self.gate.minimum_bit_parity == 0.0:
            limits = "no limits"
        lines.append(limits + "".join(f"; {text}" for text in others))
        if self.against is not None:
            lines += ["", self.against.table()]
        return "\n".join(lines)
