"""Write the images of an IDX data set, such as Fashion-MNIST, as PNG files: OUT/train/CLASS/00017.png.

    python examples/unpack_images.py examples/fashion-mnist-mini OUT

The number in a name is the image's place in its IDX file, so names are the same on every machine. The training images
go to OUT/train and the test images to OUT/test.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from PIL import Image

from admth_runtime.console import track
from admth_runtime.errors import AdmthError
from admth_runtime.files import make_folder
from admth_training.data.fashion_mnist import CLASS_NAMES, read_part

PARTS = {"train": "train", "t10k": "test"}


def unpack(source: Path, out: Path) -> int:
    """Write every image of the four IDX files in ``source`` and return how many there are."""
    count = 0
    for part, folder in PARTS.items():
        images, labels = read_part(source, part)
        folders = [make_folder(out / folder / slug(name)) for name in CLASS_NAMES]
        for number, (image, label) in enumerate(track(list(zip(images, labels, strict=True)), f"unpacking {folder}")):
            Image.fromarray(image).save(folders[label] / f"{number:05}.png")
        count += len(images)
    return count


def slug(name: str) -> str:
    """Turn a class name into a folder's: ``T-shirt/top`` becomes ``t-shirt-top``."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> int:
    """Read the arguments, unpack, and say what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with train-* and t10k-* IDX files, gzipped or not")
    parser.add_argument("out", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    try:
        count = unpack(arguments.source, arguments.out)
    except (AdmthError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {count:,} PNG files to {arguments.out}: a folder a split, and in it a folder a class")
    return 0


if __name__ == "__main__":
    sys.exit(main())
