"""Unpacks the published archive of CIFAR-10 into class folders of PNG pictures.

  wget https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
  python launch/cifar10_folders.py cifar-10-binary.tar.gz /data/cifar10

`/data/cifar10` gets `train/CLASS/00000.png` and `test/CLASS/00000.png`. It appears when it is
complete.
"""

import argparse
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tokenbridge_jax.runtime.errors import UserError
from tokenbridge_jax.runtime.progress import Progress

SIDE = 32
# A record is the label, and the red, green and blue values of all pixels.
RECORD = 1 + 3 * SIDE * SIDE
NAMES = "batches.meta.txt"


def main() -> int:
    """Reads the arguments and unpacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="cifar-10-binary.tar.gz")
    parser.add_argument("folder", type=Path, help="a new folder")
    args = parser.parse_args()
    try:
        count = unpack(args.archive, args.folder)
    except (UserError, OSError) as error:
        print(f"cifar10_folders.py: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {count:,} pictures to {args.folder}")
    return 0


def unpack(archive: Path, folder: Path) -> int:
    """Writes the pictures of the archive; returns their number.

    Raises:
      UserError: the folder exists, or the file is not the binary version of CIFAR-10.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; name a new folder")
    try:
        with tarfile.open(archive) as tar:
            files = {Path(member.name).name: tar.extractfile(member) for member in tar}
            parts = {name: file.read() for name, file in files.items() if file}
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive} cannot be read ({error}); download it again") from error
    batches = {name: part for name, part in parts.items() if "_batch" in name}
    sizes_fit = all(len(part) % RECORD == 0 for part in batches.values())
    if NAMES not in parts or not batches or not sizes_fit:
        raise UserError(f"{archive} is not the binary version of CIFAR-10, cifar-10-binary.tar.gz")
    classes = parts[NAMES].decode().split()
    if max(max(part[::RECORD]) for part in batches.values()) >= len(classes):
        raise UserError(f"{archive} is damaged; download it again")

    total = sum(map(len, batches.values())) // RECORD
    partial = folder.with_name(f"{folder.name}.partial")
    counts: dict[Path, int] = {}
    with Progress(total, desc="pictures") as progress:
        for name in sorted(batches):
            records = np.frombuffer(batches[name], np.uint8).reshape(-1, RECORD)
            images = records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
            for label, image in zip(records[:, 0], images, strict=True):
                target = partial / ("test" if "test" in name else "train") / classes[label]
                number = counts[target] = counts.get(target, -1) + 1
                target.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.ascontiguousarray(image)).save(target / f"{number:05d}.png")
                progress.update(1)
    partial.rename(folder)
    return total


if __name__ == "__main__":
    sys.exit(main())
