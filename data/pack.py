"""Decodes the faces of a data set once, into a memory map that all workers and processes of a training share.

    python -m data.pack CelebAMask-HQ.zip --split celebahq --part train --resolution 256 --out datasets/celebahq256
    python train.py fit --config configs/amortized_256.yaml --data.train celebahq256 --data.split null --data.val ...

A face takes 3 R² bytes: CelebA-HQ's 24,183 training faces 4.8 GB at 256 px, 76 GB at 1024 px. The licence of the
pictures is that of the packed ones. Where the same faces are packed already, nothing is done.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.console import blame, number_option, path_option, print_line, run_command
from data.faces import Faces
from data.files import atomic_folder, check_names, write_names
from data.packed import ARRAY, NAMES, PackedFaces
from data.shared_memory import affordable_workers
from data.splits import add_split_options

BATCH = 16


def pack(faces: Faces, out: Path, workers: int = 0) -> None:
    """Writes packed faces, completely or not at all, into a folder that must not exist; OSError if there is no room."""
    shape = (len(faces), 3, faces.resolution, faces.resolution)
    check_names(faces.names)
    loader = DataLoader(faces, BATCH, num_workers=affordable_workers(workers, BATCH * int(np.prod(shape[1:]))))
    with atomic_folder(out) as partial:
        # Written in order, not through the map: a full disk is then an error and not a killed process.
        with (partial / ARRAY).open("wb") as file, tqdm(total=len(faces), unit="face", disable=None) as progress:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for batch in loader:
                file.write(batch.numpy().tobytes())
                progress.update(len(batch))
            file.flush()
            os.fsync(file.fileno())
        write_names(partial / NAMES, faces.names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 1 if the faces could not be packed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="zip or folder of square faces")
    add_split_options(parser, part="train")
    parser.add_argument("--resolution", type=number_option, required=True, metavar="R", help="size in pixels")
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR", help="folder to be made")
    parser.add_argument("--limit", type=number_option, metavar="N", help="only the first N in sorted order")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 0, metavar="N", help="default: one a core")
    args = parser.parse_args(arguments)
    if args.workers < 0:
        parser.error(f"--workers: expected 0 or more, got {args.workers}")
    return run_command("data.pack", lambda: _pack(args, parser))


def _pack(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    with blame("source, --split"):
        faces = Faces(args.source, args.resolution, args.limit, cache_bytes=0, split=args.split, part=args.part)
    if PackedFaces.is_one(args.out):
        packed = PackedFaces(args.out)
        if (packed.names, packed.resolution) != (faces.names, args.resolution):
            parser.error(f"--out: {args.out} holds other faces; delete it, or name another")
        print_line(f"{args.out}: {len(faces)} faces of {args.resolution} px are packed there already")
        return 0
    if os.path.lexists(args.out):
        parser.error(f"--out: {args.out} exists and holds no packed faces; name another")
    pack(faces, args.out, args.workers)
    print_line(f"{args.out}: {len(faces)} faces of {args.resolution} px")
    return 0


if __name__ == "__main__":
    sys.exit(main())
