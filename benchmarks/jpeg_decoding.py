"""load_image on JPEG files: simplejpeg against Pillow alone, and against what a plain use of Pillow costs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from _harness import Figure, interleave, milliseconds, paired_ratio, report
from PIL import Image, ImageOps

from admth_runtime import decoding, load_image

SIZES = ((500, 375, 400), (1600, 900, 120), (4000, 3000, 20))


def main() -> None:
    """Time the three on pictures of three sizes, interleaved; their pixels must be the same."""
    details, ratios = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for width, height, rounds in SIZES:
            path = Path(folder) / f"{width}x{height}.jpg"
            _picture(width, height).save(path, quality=90)
            assert all(np.array_equal(load_image(path), other(path)) for other in (_pillow_alone, _plain_pillow))
            ours, alone, plain = interleave(
                [lambda p=path: load_image(p), lambda p=path: _pillow_alone(p), lambda p=path: _plain_pillow(p)],
                rounds=rounds,
            )
            ratios.append(paired_ratio(plain, ours)["median"])
            details[f"{width}x{height}"] = {
                "load_image, ms": milliseconds(ours),
                "load_image without simplejpeg, ms": milliseconds(alone),
                "Image.open, exif_transpose, convert, ms": milliseconds(plain),
                "plain Pillow / load_image": paired_ratio(plain, ours),
                "without simplejpeg / with": paired_ratio(alone, ours),
            }
    report(
        Figure(
            name="decoding a JPEG with simplejpeg against plain Pillow, the same pixels",
            value=", ".join(f"{ratio:.2f} ({w}x{h})" for (w, h, _), ratio in zip(SIZES, ratios, strict=True))
            + " times faster",
            target="the same pixels, and never slower by more than 2 %",
            met=min(ratios) >= 0.98,
            details={**details, "decoder": decoding.jpeg_decoder()},
        )
    )


def _pillow_alone(path: Path) -> Image.Image:
    used, decoding._simplejpeg = decoding._simplejpeg, lambda: None
    try:
        return load_image(path)
    finally:
        decoding._simplejpeg = used


def _plain_pillow(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _picture(width: int, height: int) -> Image.Image:
    """Smooth colours with grain, some 1.5 bits a pixel at quality 90, like a photograph."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + generator.integers(-20, 21, (height, width, 1))).clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
