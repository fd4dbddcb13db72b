"""Looks into files of StyleGAN2 weights, converts them, and downloads published ones.

What is in a file of whatever program (no code that it may hold is executed):

    python -m models.checkpoints inspect network-snapshot-025000.pkl stylegan2-ffhq-config-f.pt

Any of them as a .safetensors file of this project, exact, or rounded to half the size:

    python -m models.checkpoints convert stylegan2-ffhq-256x256.pkl weights/ffhq256.safetensors
    python -m models.checkpoints convert mine.pt mine.safetensors --name mine --licence "CC BY 4.0" --dtype float16

Published weights: which there are, on which terms, and how to get one:

    python -m models.checkpoints list
    python -m models.checkpoints fetch ffhq256
    python -m models.checkpoints fetch ffhq256 --out weights

Files are looked for in the folder named by $AMORTIZED_PULSE_WEIGHTS, in torch.hub's checkpoints, and in weights/ of the
repository; `fetch` puts them into the first of these, or where --out says.

The exit status is 0 if all went well, 1 if something did not (each file is named with the reason), 2 if the command
itself was wrong, and 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.console import FAILURES, format_error, path_option, print_error, print_line, text_option
from data.files import check_replaceable, owned_file, sha256_of
from models.checkpoints.generators import (
    infer_config,
    is_generator_file,
    make_generator,
    read_checkpoint,
    save_generator,
)
from models.checkpoints.layouts import Checkpoint
from models.generator import Generator
from models.pretrained import card_of, fetch, find_card, read_cards, weight_folders

DTYPES = {"float32": torch.float32, "float16": torch.float16}
MEAN = "mapping.w_avg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    logging.basicConfig(format="note: %(message)s", level=logging.INFO)
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m models.checkpoints",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="{inspect,convert,fetch,list}")

    command = commands.add_parser("inspect", help="say what is in files of weights")
    command.add_argument("files", nargs="+", metavar="FILE", type=Path)
    command.set_defaults(run=_inspect)

    command = commands.add_parser("convert", help="write a file of weights as .safetensors")
    command.add_argument("file", metavar="FILE", type=Path, help="a StyleGAN2 generator, in any layout that is read")
    command.add_argument("out", metavar="OUT.safetensors", type=_safetensors)
    command.add_argument("--name", type=text_option, help="kept in the file (default: the card's or the file's)")
    command.add_argument("--licence", type=text_option, help="the terms, kept in the file (default: the card's)")
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="float32 is exact, float16 half the size (default: float32)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace a generator of ours")
    command.set_defaults(run=_convert)

    command = commands.add_parser("fetch", help="download published weights")
    command.add_argument("name", metavar="NAME", help="one of those that `list` shows")
    command.add_argument("--out", metavar="DIR", type=path_option, help=f"default: {weight_folders()[0]}")
    command.set_defaults(run=_fetch)

    command = commands.add_parser("list", help="show the published weights that are known by name")
    command.set_defaults(run=_list)
    return parser


def _safetensors(text: str) -> Path:
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .safetensors, got {text!r}")
    return Path(text)


def _inspect(args: argparse.Namespace) -> int:
    failed = False
    for i, path in enumerate(args.files):
        try:
            rows = _describe(path)
        except FAILURES as error:
            failed = True
            _fail(path, error)
            continue
        if i:
            print_line("")
        print_line(str(path))
        width = max(map(len, rows))
        for name, value in rows.items():
            print_line(f"  {name:<{width}}  {format_error(ValueError(value))}")
    return int(failed)


def _describe(path: Path) -> dict[str, str]:
    """Reads a file and names what is in it."""
    checkpoint = read_checkpoint(path)
    tensors = checkpoint.tensors
    generator = _without_mean(checkpoint, path)
    digest = sha256_of(path)
    card = card_of(path, digest, generator.resolution)
    rows = {
        "layout": checkpoint.layout,
        "resolution": f"{generator.resolution} px",
        "channels": " ".join(map(str, generator.channels)) + f" (4 to {generator.resolution} px)",
        "z, w": f"{generator.z_dim}, {generator.w_dim} wide",
        "mapping": f"{generator.mapping.num_layers} layers",
        "styles": str(generator.num_ws),
        "conv_clamp": "none" if generator.conv_clamp is None else f"{generator.conv_clamp:g}",
        "mean latent": "in the file" if MEAN in tensors else "not in the file; computed when it is read",
        "parameters": f"{sum(p.numel() for p in generator.parameters()):,}",
        "numbers": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        "size": _megabytes(path),
        "sha256": digest,
    }
    if card:
        rows["card"] = f"{card.name} by its {'sha256' if card.sha256 == digest else 'name'}: {card.licence}"
    return {**rows, **{f"note {name}": text for name, text in checkpoint.notes.items()}}


def _without_mean(checkpoint: Checkpoint, path: Path) -> Generator:
    """Builds the generator, so that its shapes are checked; a mean latent that is missing stays 0: it takes seconds."""
    if MEAN in checkpoint.tensors:
        return make_generator(checkpoint, path)
    zeros = torch.zeros(infer_config(checkpoint.tensors, path)["w_dim"])
    filled = Checkpoint(checkpoint.layout, {**checkpoint.tensors, MEAN: zeros}, checkpoint.conv_clamp)
    return make_generator(filled, path)


def _convert(args: argparse.Namespace) -> int:
    path, out = args.file, args.out
    try:
        if out.exists() and path.exists() and out.samefile(path):
            raise ValueError("expected another file to write to, got the one to read from; name another")
        check_replaceable(out, args.overwrite, ours=is_generator_file(out))
        checkpoint = read_checkpoint(path)
        generator = make_generator(checkpoint, path)
        notes = _notes(checkpoint, path, generator.resolution, args)
        with owned_file(out, args.overwrite, ours=is_generator_file) as partial:
            save_generator(generator, partial, notes, DTYPES[args.dtype])
    except FAILURES as error:
        _fail(path, error)
        return 1
    print_line(f"{out}: {generator.resolution} px, {args.dtype}, {_megabytes(out)}")
    if MEAN not in checkpoint.tensors:
        print_line("  mean latent: computed, for it was not in the file")
    for name in sorted(notes):
        print_line(f"  {name}: {format_error(ValueError(notes[name]))}")
    return 0


def _notes(checkpoint: Checkpoint, path: Path, resolution: int, args: argparse.Namespace) -> dict[str, str]:
    """Gathers what is kept with the tensors: what the user says, else what the file says, else what its card says."""
    digest = sha256_of(path)
    card = card_of(path, digest, resolution)
    own = checkpoint.notes
    unknown = f"unknown: {path.name} does not say; ask whoever made it"
    notes = {
        **own,
        "name": args.name or own.get("name") or (card.name if card else path.stem),
        "licence": args.licence or own.get("licence") or (f"{card.licence}, {card.licence_url}" if card else unknown),
        "source": path.name,
        "source_sha256": digest,
        "resolution": str(resolution),
    }
    return {name: text.encode("utf-8", "backslashreplace").decode() for name, text in notes.items()}


def _fetch(args: argparse.Namespace) -> int:
    try:
        card = find_card(args.name)
        print_line(f"{card.name}: {card.note}, {card.resolution} px")
        print_line(f"   {card.licence}")
        print_line(f"   {card.licence_url}")
        path, found = fetch(card, args.out)
    except FAILURES as error:
        _fail(Path(args.name), error)
        return 1
    if card.sha256 is None:
        print_error(
            f"warning: {card.name}: its publisher names no sha256, so nobody checked that this is the right file. It "
            f"has {found}; compare it with that of others who have it."
        )
    print_line(f"{path}: {_megabytes(path)}, sha256 {found}")
    return 0


def _list(args: argparse.Namespace) -> int:
    rows = [("NAME", "PX", "SIZE", "HERE", "TERMS", "WHAT")]
    numbers: dict[tuple[str, str], int] = {}
    for card in read_cards().values():
        path = next((p for folder in weight_folders() if (p := folder / card.file).is_file()), None)
        here = str(path) if path else "no" if card.url else "no, by hand"
        number = numbers.setdefault((card.licence, card.licence_url), len(numbers) + 1)
        rows.append((card.name, str(card.resolution), _megabytes(path) if path else "", here, str(number), card.note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print_line("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print_line("")
    print_line("TERMS")
    for (licence, address), number in numbers.items():
        print_line(f"{number}  {licence}")
        print_line(f"   {address}")
    return 0


def _fail(path: Path, error: BaseException) -> None:
    text = format_error(error)
    print_error(text if text.startswith(f"{path}: ") else f"{path}: {text}")


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
