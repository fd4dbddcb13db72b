"""Boundaries of attributes in a generator's W: fit them, combine them, look at them, exchange them with InterFaceGAN.

Those that the project ships were made by

    python -m editing.boundaries fit --bundle bundles/celeba64

which draws 50,000 faces, scores them with the bundle's attributes.safetensors, fits a linear support vector machine for
every attribute, conditions each edit on the attributes that it drags along, chooses its layers, and writes
boundaries/NAME.npz into the bundle. It goes on where it was interrupted. Others, and more samples:

    python -m editing.boundaries fit smile hat --bundle bundles/celeba64 --samples 100000

What there is, and how good it is:

    python -m editing.boundaries inspect --bundle bundles/celeba64

A boundary that leaves others alone, or the raw one, under a new name:

    python -m editing.boundaries combine smile --without male young --as smile-only --bundle bundles/celeba64
    python -m editing.boundaries combine smile --as smile-raw --bundle bundles/celeba64

From and to InterFaceGAN's .npy files:

    python -m editing.boundaries import stylegan_smile_boundary.npy --as smile --bundle mine
    python -m editing.boundaries export smile smile.npy --bundle bundles/celeba64

Boundaries belong to one generator, by its sha256, and are refused beside another one. The encoder does not matter: to
add them to a bundle whose generator is the same, copy the folder boundaries/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.command import complain, reason_of, say
from data.report import complete_file
from editing.boundary import (
    FOLDER,
    Boundary,
    export_interfacegan,
    import_interfacegan,
    names_in,
    read_boundaries,
    write_boundary,
)
from editing.fitting import Hyperplane, Whitening, direction_of, planes_of
from editing.names import DEFAULT_EDITS, attribute_of
from models.bundle_info import GENERATOR
from models.pretrained import ROOT
from models.weights import load_generator, sha256_of

CLASSIFIER = "attributes.safetensors"
LEAST_SAMPLES = 10_000
DEFAULT_SAMPLES = 50_000
W_SAMPLES = 50_000  # codes that the covariance of W is measured on, where no faces are drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Command line without the program's name; that of the process if None.

    Returns:
        The exit status: 0 if all was done, 1 if not, 130 after Ctrl-C.
    """
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        complain(reason_of(error))
        return 1
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on")
        return 130


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m editing.boundaries", description=description, epilog=rest, **style)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub.add_argument

    add = command("fit", _fit, "sample, score, fit and choose")
    add("names", nargs="*", metavar="NAME", help=f"edits to make (default: {' '.join(DEFAULT_EDITS)})")
    add("--samples", type=int, default=DEFAULT_SAMPLES, metavar="N", help="faces to draw (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the faces, from 0 (default: 0)")
    add("--classifier", type=Path, metavar="FILE", help=f"attribute classifier (default: the bundle's {CLASSIFIER})")
    add("--cache", type=Path, default=Path("runs/boundaries"), metavar="DIR", help="scores (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    add("--bundle", type=Path, default=ROOT / "bundles" / "celeba64", metavar="DIR")
    add = command("combine", _combine, "make a boundary that leaves the attributes of others alone")
    add("name", metavar="NAME", help="of the boundary to begin with")
    add("--without", nargs="*", default=[], metavar="OTHER", help="boundaries to project out; none: the raw direction")
    add("--as", dest="new", required=True, metavar="NEW", help="name of the new boundary")
    add("--bundle", type=Path, default=ROOT / "bundles" / "celeba64", metavar="DIR")
    add = command("inspect", _inspect, "list boundaries and the angles between their directions")
    add("names", nargs="*", metavar="NAME", help="which (default: all)")
    add("--bundle", type=Path, default=ROOT / "bundles" / "celeba64", metavar="DIR")
    add = command("import", _import, "take over a boundary of InterFaceGAN (.npy)")
    add("file", type=Path, metavar="FILE")
    add("--as", dest="new", required=True, metavar="NAME")
    add("--bundle", type=Path, default=ROOT / "bundles" / "celeba64", metavar="DIR")
    add = command("export", _export, "write a boundary for InterFaceGAN (.npy)")
    add("name", metavar="NAME")
    add("file", type=Path, metavar="FILE")
    add("--bundle", type=Path, default=ROOT / "bundles" / "celeba64", metavar="DIR")
    return parser


def _fit(args: argparse.Namespace) -> int:
    from editing.choosing import Chooser  # these need the networks
    from editing.sampling import sample_and_score
    from models.attributes import load_attributes
    from models.determinism import use_deterministic_kernels
    from models.device import choose_device

    names = args.names or list(DEFAULT_EDITS)
    wanted = [attribute_of(name)[0] for name in names]
    if args.samples < LEAST_SAMPLES or args.seed < 0:
        raise ValueError(
            f"--samples, --seed: expected {LEAST_SAMPLES} samples or more, got {args.samples}, {args.seed}"
        )
    use_deterministic_kernels()
    device = choose_device(args.device)
    source = args.classifier or args.bundle / CLASSIFIER
    generator, classifier = load_generator(args.bundle / GENERATOR, device), load_attributes(source, device)
    hashes = {"generator_sha256": sha256_of(args.bundle / GENERATOR), "classifier_sha256": sha256_of(source)}
    say(f"drawing and scoring {args.samples} faces; those of an earlier call are in {args.cache}")
    samples = sample_and_score(generator, classifier, args.samples, args.seed, args.cache, " ".join(hashes.values()))
    balance = classifier.rates.logit().cpu().numpy()
    whitening, planes, left_out = planes_of(samples, balance, classifier.names, wanted, args.seed)
    for reason in left_out.values():
        complain(f"note: no condition on {reason}")
    chooser = Chooser(generator, classifier, planes, whitening, seed=args.seed + 1_000_000)
    for name in names:
        about = {"samples": args.samples, "seed": args.seed, "classifier_sha256": hashes["classifier_sha256"]}
        boundary = _choose(name, chooser, about, hashes["generator_sha256"])
        write_boundary(boundary, args.bundle / FOLDER / f"{name}.npz")
        say(_line(boundary))
    return 0


def _choose(name: str, chooser: Any, about: dict[str, Any], generator_sha256: str) -> Boundary:
    """Chooses conditions and layers of an edit."""
    attribute, sign = attribute_of(name)
    choice = chooser.choose(name)
    plane = chooser.planes[attribute]
    normal, intercept = plane.in_w(chooser.whitening)
    about |= {
        "attribute": attribute,
        "sign": sign,
        "conditions": choice.conditions,
        "held_out_accuracy": round(plane.accuracy, 4),
        "faces_per_end": plane.ends,
        "own_change": round(choice.trial.own, 4),
        "drift_p90": round(choice.trial.typical, 4),
        "measured_at": chooser.side(name) * 2,
    }
    return Boundary(name, sign * normal, sign * intercept, choice.direction, choice.layers, generator_sha256, about)


def _combine(args: argparse.Namespace) -> int:
    found = read_boundaries(args.bundle / FOLDER, [args.name, *args.without], sha256_of(args.bundle / GENERATOR))
    whitening = whitening_of(args.bundle)
    planes = {name: _plane(boundary, whitening) for name, boundary in found.items()}
    direction = direction_of(planes[args.name], [planes[other] for other in args.without], whitening)
    base = found[args.name]
    about = {key: value for key, value in base.about.items() if key in ("attribute", "sign", "samples", "seed")}
    about["conditions"] = [found[other].about.get("attribute", other) for other in args.without]
    boundary = Boundary(args.new, base.normal, base.intercept, direction, base.layers, base.generator_sha256, about)
    return _write_new(boundary, args.bundle)


def whitening_of(bundle: Path) -> Whitening:
    """Measures mean and covariance of W on 50,000 codes of a bundle's generator, without drawing faces."""
    from editing.sampling import sample_w

    return Whitening.of(sample_w(load_generator(bundle / GENERATOR), W_SAMPLES, 0).numpy())


def raw_direction(boundary: Boundary, whitening: Whitening) -> np.ndarray:
    """The step (D,) of one standard deviation that a boundary's normal gives without conditions."""
    return direction_of(_plane(boundary, whitening), [], whitening)


def _plane(boundary: Boundary, whitening: Whitening) -> Hyperplane:
    """The boundary's hyperplane in whitened coordinates: n · w + b with w = μ + C u."""
    normal = whitening.factor.T @ boundary.normal
    length = float(np.linalg.norm(normal))
    return Hyperplane(normal / length, (boundary.intercept + float(boundary.normal @ whitening.mean)) / length, 0.0, 0)


def _inspect(args: argparse.Namespace) -> int:
    names = args.names or names_in(args.bundle / FOLDER)
    if not names:
        raise ValueError(f"no boundaries in {args.bundle / FOLDER}; python -m editing.boundaries fit makes them")
    found = read_boundaries(args.bundle / FOLDER, names, sha256_of(args.bundle / GENERATOR))
    for boundary in found.values():
        say(_line(boundary))
    units = np.stack([b.direction / np.linalg.norm(b.direction) for b in found.values()])
    say("\ncosines of the directions")
    say(" " * 14 + "".join(f"{name[:11]:>12}" for name in found))
    for name, row in zip(found, units @ units.T, strict=True):
        say(f"{name[:13]:14}" + "".join(f"{value:12.2f}" for value in row))
    return 0


def _line(boundary: Boundary) -> str:
    about, (start, stop) = boundary.about, boundary.layers
    parts = [f"layers {start} to {stop - 1}", f"σ {boundary.spread:.3f}"]
    if "held_out_accuracy" in about:
        parts += [
            f"held-out accuracy {about['held_out_accuracy']:.3f} ({about['faces_per_end']} faces per end)",
            f"own change {about['own_change']:.2f}, drift {about['drift_p90']:.2f} at {about['measured_at']:+d}",
        ]
    if about.get("conditions"):
        parts.append(f"without {', '.join(about['conditions'])}")
    if about.get("from"):
        parts.append(about["from"])
    return f"{boundary.name}: " + "; ".join(parts)


def _import(args: argparse.Namespace) -> int:
    from editing.sampling import sample_w

    try:
        array = np.load(args.file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{args.file}: expected a .npy array without objects ({error})") from error
    generator = load_generator(args.bundle / GENERATOR)
    if not isinstance(array, np.ndarray) or array.size != generator.w_dim:
        found = array.shape if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{args.file}: expected a normal of {generator.w_dim} numbers for this generator, got {found}")
    normal = array.reshape(-1) / np.linalg.norm(array)
    spread = float((sample_w(generator, W_SAMPLES, 0).numpy() @ normal).std())
    sha256 = sha256_of(args.bundle / GENERATOR)
    return _write_new(import_interfacegan(array, args.new, spread, sha256, generator.num_ws), args.bundle)


def _write_new(boundary: Boundary, bundle: Path) -> int:
    path = bundle / FOLDER / f"{boundary.name}.npz"
    if path.exists():
        raise ValueError(f"{path} exists; remove it first, or name another with --as")
    write_boundary(boundary, path)
    say(_line(boundary))
    return 0


def _export(args: argparse.Namespace) -> int:
    sha256 = sha256_of(args.bundle / GENERATOR)
    boundary = read_boundaries(args.bundle / FOLDER, [args.name], sha256)[args.name]
    if args.file.suffix != ".npy":
        raise ValueError(f"expected a file that ends in .npy, got {args.file}")
    with complete_file(args.file) as partial, open(partial, "wb") as file:
        np.save(file, export_interfacegan(boundary))
    length, (start, stop) = np.linalg.norm(boundary.direction), boundary.layers
    say(f"{args.file}: a strength of 1 is {length:.4f} of its unit, in styles {start} to {stop - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
