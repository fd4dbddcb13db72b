"""Boundaries of attributes in a generator's W: fit them, combine them, look at them, exchange them with InterFaceGAN.

Those that the project ships were made by

    python -m editing.boundaries fit --bundle bundles/celeba64 --classifier runs/attributes_64/attributes.safetensors

which draws 50,000 faces, scores them with that classifier (configs/attributes_64.yaml trains it), fits a linear support
vector machine for every attribute, learns how each layer should follow its normal so that everything else stays (with
LPIPS, whose weights it needs), and writes boundaries/NAME.npz into the bundle. It goes on where it was interrupted.
With the same --classifier, others, and more samples:

    python -m editing.boundaries fit smile hat --bundle bundles/celeba64 --samples 100000

As InterFaceGAN makes them, one direction for all layers, conditioned on the attributes that it drags along:

    python -m editing.boundaries fit --shared --bundle bundles/celeba64

What there is, and how good it is:

    python -m editing.boundaries inspect --bundle bundles/celeba64

One direction that leaves others alone, or the raw one, under a new name:

    python -m editing.boundaries combine smile --without male young --as smile-only --bundle bundles/celeba64
    python -m editing.boundaries combine smile --as smile-raw --bundle bundles/celeba64

From and to InterFaceGAN's .npy files:

    python -m editing.boundaries import stylegan_smile_boundary.npy --as smile --bundle mine
    python -m editing.boundaries export smile smile.npy --bundle bundles/celeba64

Boundaries belong to one generator, by its sha256, and are refused beside another one. The encoder hardly matters, which
only makes half of the faces that they are learned on: to add them to a bundle whose generator is the same, copy the
folder boundaries/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from data.command import complain, path_option, reason_of, say
from data.files import check_replaceable, owned_file
from editing.boundary import (
    FOLDER,
    Boundary,
    export_interfacegan,
    import_interfacegan,
    is_boundary_file,
    names_in,
    read_boundaries,
    read_boundary,
    write_boundary,
)
from editing.fitting import Hyperplane, Whitening, direction_of, planes_of
from editing.names import DEFAULT_EDITS, attribute_of
from models.bundle_info import GENERATOR, INFO
from models.checkpoints import load_generator, sha256_of
from models.pretrained import ROOT

if TYPE_CHECKING:
    import torch

    from editing.choosing import Choice, Chooser
    from losses.perceptual import LPIPS
    from models.attributes import AttributeClassifier
    from models.bundle import Bundle
    from models.generator import Generator

CLASSIFIER = "attributes.safetensors"
LEAST_SAMPLES = 10_000
DEFAULT_SAMPLES = 50_000
DEFAULT_STEPS = 240
STEPS = {"smile": 360}  # of edits that need more
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

    more = ", ".join(f"{name} {steps}" for name, steps in STEPS.items())
    add = command("fit", _fit, "sample, score, fit and learn")
    add("names", nargs="*", metavar="NAME", help=f"edits to make (default: {' '.join(DEFAULT_EDITS)})")
    add("--samples", type=int, default=DEFAULT_SAMPLES, metavar="N", help="faces to draw (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the faces, from 0 (default: 0)")
    add("--steps", type=int, metavar="N", help=f"of learning an edit (default: {DEFAULT_STEPS}, but {more})")
    add("--shared", action="store_true", help="one direction for all layers, by projection; nothing is learned")
    add("--classifier", type=Path, metavar="FILE", help=f"attribute classifier (default: the bundle's {CLASSIFIER})")
    add("--overwrite", action="store_true", help="replace boundaries that were made otherwise")
    add(
        "--cache",
        type=path_option,
        default=Path("runs/boundaries"),
        metavar="DIR",
        help="scores (default: %(default)s)",
    )
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
    add("file", type=path_option, metavar="FILE")
    add("--overwrite", action="store_true", help="replace what an earlier call wrote")
    add("--bundle", type=Path, default=ROOT / "bundles" / "celeba64", metavar="DIR")
    return parser


def _fit(args: argparse.Namespace) -> int:
    from losses.perceptual import LPIPS  # these need the networks
    from models.attributes import load_attributes
    from models.determinism import use_deterministic_kernels
    from models.device import choose_device

    wanted = list(dict.fromkeys(args.names or DEFAULT_EDITS))
    for name in wanted:
        attribute_of(name)  # refuses what is none, before anything is drawn
    if args.samples < LEAST_SAMPLES or args.seed < 0 or (args.steps is not None and args.steps < 1):
        raise ValueError(
            f"--samples, --seed, --steps: expected {LEAST_SAMPLES} samples or more, a seed from 0 and at least 1 step, "
            f"got {args.samples}, {args.seed}, {args.steps}"
        )
    device, source = choose_device(args.device), args.classifier or args.bundle / CLASSIFIER
    generator, classifier = load_generator(args.bundle / GENERATOR, device), load_attributes(source, device)
    hashes = {"generator_sha256": sha256_of(args.bundle / GENERATOR), "classifier_sha256": sha256_of(source)}
    about = {"samples": args.samples, "seed": args.seed, "classifier_sha256": hashes["classifier_sha256"]}
    steps = {name: 0 if args.shared else args.steps or STEPS.get(name, DEFAULT_STEPS) for name in wanted}
    folder, owner = args.bundle / FOLDER, hashes["generator_sha256"]
    names = [n for n in wanted if not _is_there(folder / f"{n}.npz", about | {"steps": steps[n]}, owner)]
    if not names:
        return 0
    for path in (folder / f"{name}.npz" for name in names):
        check_replaceable(path, args.overwrite, ours=is_boundary_file(path))
    use_deterministic_kernels()
    # What may be missing or damaged: better now than after all that follows.
    lpips, bundle = (None, None) if args.shared else (LPIPS().to(device), _bundle_of(args.bundle, device))
    chooser = _chooser(generator, classifier, names, args, " ".join(hashes.values()))
    mine = {name: steps[name] for name in names}
    choose = chooser.choose if lpips is None else _learner(chooser, lpips, bundle, args.seed, mine)
    for name in names:
        boundary = _boundary(name, chooser, choose(name), about | {"steps": steps[name]}, owner)
        write_boundary(boundary, folder / f"{name}.npz")
        say(_line(boundary))
    return 0


def _chooser(
    generator: Generator,
    classifier: AttributeClassifier,
    names: Sequence[str],
    args: argparse.Namespace,
    made_with: str,
) -> Chooser:
    """Samples, scores and fits the hyperplanes."""
    from editing.choosing import Chooser
    from editing.sampling import sample_and_score

    wanted = [attribute_of(name)[0] for name in names]
    say(f"drawing and scoring {args.samples} faces; those of an earlier call are in {args.cache}")
    samples = sample_and_score(generator, classifier, args.samples, args.seed, args.cache, made_with)
    balance = classifier.rates.logit().cpu().numpy()
    whitening, planes, left_out = planes_of(samples, balance, classifier.names, wanted, args.seed, args.shared)
    for reason in left_out.values():
        complain(f"note: no condition on {reason}")
    return Chooser(generator, classifier, planes, whitening, seed=args.seed + 1_000_000)


def _is_there(path: Path, about: dict[str, Any], generator_sha256: str) -> bool:
    """Says whether a boundary was made by the same command already, before an interruption."""
    try:
        found = read_boundary(path)
    except (FileNotFoundError, ValueError):  # what is damaged is made anew
        return False
    there = found.generator_sha256 == generator_sha256 and about.items() <= found.about.items()
    if there:
        say(f"{_line(found)}; made earlier, remove {path} to make it anew")
    return there


def _bundle_of(folder: Path, device: torch.device) -> Bundle | None:
    """Reads the bundle whose encoder makes half of the faces to learn on; None where there is a generator alone."""
    from models.bundle import load_bundle

    if (folder / INFO).is_file():
        return load_bundle(folder, device)
    complain(f"note: {folder} has no {INFO}, so no encoder: learned on the generator's own faces alone")
    return None


def _learner(
    chooser: Chooser, lpips: LPIPS, bundle: Bundle | None, seed: int, steps: dict[str, int]
) -> Callable[[str], Choice]:
    """Gives what learns an edit by its name, in so many steps of the optimiser, with a progress bar."""
    from editing.choosing import Choice
    from editing.learning import BATCH, StepLearner, codes_to_learn_on

    most = max(steps.values())
    with tqdm(total=most * BATCH, unit="face", desc="faces to learn on", leave=False, disable=None) as bar:
        codes = codes_to_learn_on(chooser.generator, most, seed + 2_000_000, bundle, bar.update)
    learner = StepLearner(chooser.generator, chooser.classifier, lpips, chooser.whitening, codes)

    def learn(name: str) -> Choice:
        with tqdm(total=steps[name], unit="step", desc=name, leave=False, disable=None) as bar:
            direction = learner.learn(name, chooser.planes[attribute_of(name)[0]], steps[name], bar.update)
        layers = (0, len(direction))
        return Choice([], direction, layers, chooser.trial(name, direction, layers))

    return learn


def _boundary(name: str, chooser: Chooser, choice: Choice, about: dict[str, Any], generator_sha256: str) -> Boundary:
    """Puts together what is known of an edit."""
    attribute, sign = attribute_of(name)
    plane = chooser.planes[attribute]
    normal, intercept = plane.in_w(chooser.whitening)
    about = about | {
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
    means = [b.steps.mean(axis=0) for b in found.values()]
    units = np.stack([d / np.linalg.norm(d) for d in means])
    say("\ncosines of the directions, each the mean of its layers")
    say(" " * 14 + "".join(f"{name[:11]:>12}" for name in found))
    for name, row in zip(found, units @ units.T, strict=True):
        say(f"{name[:13]:14}" + "".join(f"{value:12.2f}" for value in row))
    return 0


def _line(boundary: Boundary) -> str:
    about, (start, stop) = boundary.about, boundary.layers
    parts = [f"layers {start} to {stop - 1}", f"σ {boundary.spread:.3f}"]
    if "held_out_accuracy" in about:
        parts += [
            "a step for each layer" if boundary.direction.ndim == 2 else "one step for all layers",
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
    with owned_file(args.file, args.overwrite) as partial, open(partial, "wb") as file:
        np.save(file, export_interfacegan(boundary))
    length, (start, stop) = np.linalg.norm(boundary.direction), boundary.layers
    say(f"{args.file}: a strength of 1 is {length:.4f} of its unit, in styles {start} to {stop - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
