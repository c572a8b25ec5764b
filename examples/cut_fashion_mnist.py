"""Cut a class-balanced subset out of Fashion-MNIST, in the same IDX format.

This is how ``examples/fashion-mnist-mini/`` was made:

    python examples/cut_fashion_mnist.py /usr/share/datasets/fashion-mnist examples/fashion-mnist-mini

The same arguments give the same images; with the same zlib they give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import AdmthError, InputError
from admth_runtime.files import make_folder, write_text
from admth_training.data.fashion_mnist import CLASS_NAMES, IMAGES_FILE, LABELS_FILE, read_part
from admth_training.data.idx import write_idx

__all__ = ["cut", "main"]

LICENCE = """\
The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

README = """\
# Fashion-MNIST, a small cut

{train:,} training and {test:,} test images of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) by
Zalando Research (MIT licence, see LICENSE): 28x28 gray, the ten classes in equal numbers, the original's IDX format.

    admth-train fit --data fashion-mnist:examples/fashion-mnist-mini --out runs/fashion

It was cut from the full data set with

    python examples/cut_fashion_mnist.py SOURCE_DIR OUT_DIR --train {train} --test {test} --seed {seed}

Training images come from the original's training images and test images from its test images. It is for demos and
tests: figures on it are not comparable with figures on the full data set.
"""


def cut(source: Path, target: Path, *, train: int, test: int, seed: int) -> None:
    """Write the four IDX files, LICENSE and README.md into ``target``.

    Raises:
        AdmthError: the source is broken, a count does not fit it, or the target cannot be written.
    """
    parts = {}
    for part, count in (("train", train), ("t10k", test)):
        images, labels = read_part(source, part)
        # A stream of its own for each part, so that one count does not change the other part's images.
        chosen = balanced(labels, count, np.random.default_rng([seed, len(parts)]), part)
        parts[part] = images[chosen], labels[chosen]
    make_folder(target)
    for part, (images, labels) in parts.items():
        write_idx(target / f"{IMAGES_FILE.format(part=part)}.gz", images)
        write_idx(target / f"{LABELS_FILE.format(part=part)}.gz", labels)
    write_text(target / "LICENSE", LICENCE)
    write_text(target / "README.md", README.format(train=train, test=test, seed=seed))


def balanced(labels: NDArray[np.uint8], count: int, rng: np.random.Generator, part: str) -> NDArray[np.int64]:
    """Draw ``count`` positions with every class equally often, in the original's order."""
    classes = len(CLASS_NAMES)
    each, rest = divmod(count, classes)
    smallest = int(np.bincount(labels, minlength=classes).min())
    if rest or not 0 < each <= smallest:
        raise InputError(f"{count} {part} images are no multiple of {classes} from {classes} to {classes * smallest}")
    chosen = [rng.permutation(np.flatnonzero(labels == number))[:each] for number in range(classes)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SOURCE_DIR", help="folder of the full Fashion-MNIST")
    parser.add_argument("target", type=Path, metavar="OUT_DIR", help="folder to write, made where it is missing")
    parser.add_argument("--train", type=int, default=5000, help="training images (default: %(default)s)")
    parser.add_argument("--test", type=int, default=1000, help="test images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: %(default)s)")
    options = parser.parse_args()
    try:
        if options.seed < 0:
            raise InputError(f"--seed {options.seed} is negative: use 0 or more")
        cut(options.source, options.target, train=options.train, test=options.test, seed=options.seed)
    except AdmthError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {options.train:,} training and {options.test:,} test images to {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
