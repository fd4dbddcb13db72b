"""Makes a bundle of a checkpoint of pSp or e4e, for those who own its weights.

python -m cli.psp_bundle psp_celebs_super_resolution.pt --out runs/psp      # a bundle of both its networks
python evaluate.py --bundle psp=runs/psp --data CelebAMask-HQ.zip --split celebahq --part test
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data.console import blame, path_option, print_line, run_command
from models.bundle import save_bundle
from models.checkpoints import load_generator
from models.psp import PspVariant, load_psp_encoder


def bundle_of(path: Path, out: Path) -> int:
    """Makes a bundle of a checkpoint of pSp or e4e, with the generator in it.

    Args:
        path: The `.pt` file.
        out: Folder of the bundle.

    Returns:
        The exit status, 0.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold both networks.
    """
    with blame("file"):
        generator, theirs = load_generator(path), load_psp_encoder(path)
    shape = generator.resolution, generator.num_ws, generator.w_dim
    encoder = PspVariant(*shape, widths=theirs.widths, kind=theirs.kind)
    encoder.latents.fit(generator)
    encoder.load_psp(path)
    about = {"licence": "That of the checkpoint's authors", "training_data": "See the checkpoint's authors"}
    save_bundle(out, generator, encoder, {"name": path.stem, **about})
    print_line(f"{out} is a bundle")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0, or 1 with a message.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="checkpoint of pSp or e4e, with the generator in it")
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR", help="folder of the bundle")
    args = parser.parse_args(arguments)
    if os.path.lexists(args.out):
        parser.error(f"--out: {args.out} exists; name another folder")
    return run_command("cli.psp_bundle", lambda: bundle_of(args.file, args.out))


if __name__ == "__main__":
    sys.exit(main())
