"""Measures how far aligning moves faces that are aligned already: the square found in them against the whole picture.

Examples:
    python benchmarks/alignment.py --data celebahq512_val.zip --faces 120

CelebA-HQ and FFHQ share one framing, but take their landmarks from people and from dlib; here they come from MTCNN.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.face_finder import FaceFinder
from data.faces import Faces
from data.ffhq_crop import Square, ffhq_square
from data.splits import add_split_options


def summary(squares: list[Square], resolution: int) -> str:
    """Tells in one line the mean and spread of the squares' centre (in sides), side and angle (in degrees)."""
    shifts = np.stack([(square.centre - resolution / 2) / resolution for square in squares])  # (n, xy)
    sides = np.array([square.side / resolution for square in squares])
    angles = np.degrees([np.arctan2(square.right[1], square.right[0]) for square in squares])
    (x, y), (sd_x, sd_y) = shifts.mean(axis=0), shifts.std(axis=0)
    return (
        f"shift right {x:+.4f} ± {sd_x:.4f}, down {y:+.4f} ± {sd_y:.4f}; side {sides.mean():.4f} ± {sides.std():.4f}; "
        f"turned {angles.mean():+.2f} ± {angles.std():.2f} degrees"
    )


def main() -> None:
    """Prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="celebahq512_val.zip", help="aligned faces, a zip or a folder")
    add_split_options(parser)
    parser.add_argument("--faces", type=int, default=120, help="how many of them (default: 120)")
    parser.add_argument("--resolution", type=int, default=256, help="they are resized to (default: 256 px)")
    args = parser.parse_args()
    faces = Faces(args.data, args.resolution, args.faces, cache_bytes=0, split=args.split, part=args.part)
    finder, squares = FaceFinder(), []
    for face in tqdm(faces, "faces", disable=None):
        points = finder(Path(), Image.fromarray(face.permute(1, 2, 0).numpy()))
        squares += [ffhq_square(points[0])] if len(points) else []
    print(f"{len(faces)} faces of {args.resolution} px, found in {len(squares)}: {summary(squares, args.resolution)}")


if __name__ == "__main__":
    main()
