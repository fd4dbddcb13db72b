"""Edit directions of a generator: fit them, combine them, look at them, exchange them with InterFaceGAN.

Those that the project ships were made by

    python -m editing fit --bundle bundles/celeba64 --classifier runs/attributes_64/attributes.safetensors

which samples 50,000 faces, scores them with that classifier (configs/attributes_64.yaml trains it), fits a linear
support vector machine for every attribute, learns how each style should follow its normal so that everything else stays
(with LPIPS, whose weights it needs), and writes directions/NAME.npz into the bundle. The same command
resumes after an interruption. With the same --classifier, others, and more samples:

    python -m editing fit smile hat --bundle bundles/celeba64 --samples 100000

What there is, and how good it is:

    python -m editing inspect --bundle bundles/celeba64

InterFaceGAN's directions, the same step for all styles, that leave others alone or none, under a new name:

    python -m editing combine smile --without male young --as smile-only --bundle bundles/celeba64
    python -m editing combine smile --as smile-raw --bundle bundles/celeba64

From and to InterFaceGAN's .npy files:

    python -m editing import stylegan_smile_boundary.npy --as smile --bundle mine
    python -m editing export smile-raw smile.npy --bundle bundles/celeba64

Directions belong to one generator, by its sha256, and are refused for another one. The encoder only makes half of the
faces that they are learned on: for a bundle with the same generator, copy the folder directions/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from data.console import FAILURES, WrongOption, blame, format_error, path_option, print_error, print_line, run_command
from data.files import ROOT, check_replaceable, owned_file
from editing.direction import (
    FOLDER,
    EditDirection,
    export_interfacegan,
    import_interfacegan,
    is_direction_file,
    is_direction_name,
    names_in,
    read_direction,
    read_directions,
    unit_normal,
    write_direction,
)
from editing.hyperplane import Hyperplane, Whitening, fit_hyperplane, sample_and_score, sample_w, step_of
from editing.names import DEFAULT_EDITS, attribute_of
from models.bundle_info import GENERATOR, INFO
from models.checkpoints import load_generator, sha256_of

if TYPE_CHECKING:
    from editing.learning import StepLearner

CLASSIFIER = "attributes.safetensors"
LEAST_SAMPLES = 10_000
DEFAULT_SAMPLES = 50_000
DEFAULT_STEPS = 240
STEPS = {"smile": 360}  # of edits that need more
W_SAMPLES = 50_000  # codes that the covariance of W is measured on, where no faces are needed


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0 if all was done, 1 if not, 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    return run_command("python -m editing", lambda: args.run(args), "run the same command to continue")


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m editing", description=description, epilog=rest, **style)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--bundle", type=Path, default=ROOT / "bundles" / "celeba64", metavar="DIR")
        return sub.add_argument

    more = ", ".join(f"{name} {steps}" for name, steps in STEPS.items())
    add = command("fit", _fit, "sample, score, fit and learn")
    add("names", nargs="*", metavar="NAME", help=f"edits to make (default: {' '.join(DEFAULT_EDITS)})")
    add("--samples", type=int, default=DEFAULT_SAMPLES, metavar="N", help="faces to score (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the faces, from 0 (default: 0)")
    add("--steps", type=int, metavar="N", help=f"of learning an edit (default: {DEFAULT_STEPS}, but {more})")
    add("--classifier", type=Path, metavar="FILE", help=f"attribute classifier (default: the bundle's {CLASSIFIER})")
    add("--overwrite", action="store_true", help="replace directions that were made otherwise")
    where = Path("runs/directions")
    add("--cache", type=path_option, default=where, metavar="DIR", help="scores (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    add = command("combine", _combine, "make a direction with one step for all styles that leaves others alone")
    add("name", metavar="NAME", help="of the direction to begin with")
    add("--without", nargs="*", default=[], metavar="OTHER", help="directions whose normals are projected out")
    add("--as", dest="new", type=_name, required=True, metavar="NEW", help="name of the new direction")
    add = command("inspect", _inspect, "list directions and how good they are")
    add("names", nargs="*", metavar="NAME", help="which (default: all)")
    add = command("import", _import, "take over a boundary of InterFaceGAN (.npy)")
    add("file", type=Path, metavar="FILE")
    add("--as", dest="new", type=_name, required=True, metavar="NAME")
    add = command("export", _export, "write a direction for InterFaceGAN (.npy)")
    add("name", metavar="NAME")
    add("file", type=path_option, metavar="FILE")
    add("--overwrite", action="store_true", help="replace what an earlier call wrote")
    return parser


def _name(text: str) -> str:
    if not is_direction_name(text):
        raise argparse.ArgumentTypeError(f"expected a name of small letters, digits and hyphens, got {text!r}")
    return text


def _fit(args: argparse.Namespace) -> int:
    from models.device import use_deterministic_kernels

    wanted = list(dict.fromkeys(args.names or DEFAULT_EDITS))
    with blame("NAME"):
        for name in wanted:
            attribute_of(name)  # refuses what is none, before anything is sampled
    if args.samples < LEAST_SAMPLES or args.seed < 0 or (args.steps is not None and args.steps < 1):
        raise WrongOption(
            f"--samples, --seed, --steps: expected {LEAST_SAMPLES} samples or more, a seed from 0 and at least 1 step, "
            f"got {args.samples}, {args.seed}, {args.steps}"
        )
    source, owner = args.classifier or args.bundle / CLASSIFIER, _owner_of(args.bundle)
    with blame("--classifier"):
        made_by = {"samples": args.samples, "seed": args.seed, "classifier_sha256": sha256_of(source)}
    about = {name: made_by | {"steps": args.steps or STEPS.get(name, DEFAULT_STEPS)} for name in wanted}
    paths = {name: args.bundle / FOLDER / f"{name}.npz" for name in wanted}
    names = [name for name in wanted if not _is_there(paths[name], about[name], owner)]
    if not names:
        return 0
    for name in names:
        check_replaceable(paths[name], args.overwrite, ours=is_direction_file(paths[name]))
    use_deterministic_kernels()
    learner, planes = _prepare(names, args, source, f"{owner} {made_by['classifier_sha256']}")
    for name in names:
        with tqdm(total=about[name]["steps"], unit="step", desc=name, leave=False, disable=None) as bar:
            steps = learner.learn(name, planes[name], about[name]["steps"], bar.update)
        direction = _direction(name, learner, planes[name], steps, about[name], owner)
        write_direction(direction, paths[name], args.overwrite)
        print_line(_line(direction))
    return 0


def _prepare(
    names: Sequence[str], args: argparse.Namespace, source: Path, made_with: str
) -> tuple[StepLearner, dict[str, Hyperplane]]:
    """Loads the networks, samples, scores and fits the hyperplanes of edits."""
    from editing.learning import StepLearner
    from losses.perceptual import LPIPS
    from models.attributes import load_attributes
    from models.bundle import load_bundle
    from models.device import choose_device

    device = choose_device(args.device)
    classifier, lpips, bundle = load_attributes(source, device), LPIPS().to(device), None
    if (args.bundle / INFO).is_file():
        bundle = load_bundle(args.bundle, device)
    else:
        print_error(f"note: {args.bundle} has no {INFO}, so no encoder: learned on the generator's own faces alone")
    generator = load_generator(args.bundle / GENERATOR, device) if bundle is None else bundle.generator
    print_line(f"scoring {args.samples} faces; those of an earlier call are in {args.cache}")
    w, logits = sample_and_score(generator, classifier, args.samples, args.seed, args.cache, made_with)
    balance = classifier.rates.logit().cpu().numpy()  # taken off: a rare attribute is confident earlier
    whitening, planes = Whitening.of(w), {}
    u = whitening.whiten(w)
    for name in names:
        attribute = attribute_of(name)[0]
        i = classifier.names.index(attribute)
        planes[name] = fit_hyperplane(u, logits[:, i] - balance[i], attribute, args.seed)
    return StepLearner(generator, classifier, lpips, whitening, bundle, args.seed), planes


def _is_there(path: Path, about: dict[str, Any], generator_sha256: str) -> bool:
    """Says whether a direction was made by the same command already, before an interruption."""
    try:
        found = read_direction(path)
    except (FileNotFoundError, ValueError):  # what is damaged is made anew
        return False
    there = found.generator_sha256 == generator_sha256 and about.items() <= found.about.items()
    if there:
        print_line(f"{_line(found)}; made earlier, remove {path} to make it anew")
    return there


def _direction(
    name: str, learner: StepLearner, plane: Hyperplane, steps: np.ndarray, about: dict[str, Any], owner: str
) -> EditDirection:
    """Puts together what is known of an edit."""
    attribute, sign = attribute_of(name)
    normal, intercept = plane.in_w(learner.whitening)
    effect = learner.measure(name, steps)
    about = about | {
        "attribute": attribute,
        "sign": sign,
        "held_out_accuracy": round(plane.accuracy, 4),
        "faces_per_end": plane.ends,
        "target_effect": round(effect.target, 4),
        "leakage": round(effect.leakage, 4),
        "measured_at": learner.side(name) * 2,
    }
    return EditDirection(name, sign * normal, sign * intercept, steps, owner, about)


def _combine(args: argparse.Namespace) -> int:
    found = read_directions(args.bundle / FOLDER, [args.name, *args.without], _owner_of(args.bundle))
    whitening = whitening_of(args.bundle)
    planes = {name: Hyperplane.of_w(d.normal, d.intercept, whitening) for name, d in found.items()}
    step = step_of(planes[args.name], [planes[other] for other in args.without], whitening)
    base = found[args.name]
    about = {key: value for key, value in base.about.items() if key in ("attribute", "sign", "samples", "seed")}
    about["conditions"] = [found[other].about.get("attribute", other) for other in args.without]
    steps = np.tile(step, (len(base.steps), 1))
    new = EditDirection(args.new, base.normal, base.intercept, steps, base.generator_sha256, about)
    return _write_new(new, args.bundle)


def _owner_of(bundle: Path) -> str:
    """Gives the sha256 of a bundle's generator."""
    with blame("--bundle"):
        return sha256_of(bundle / GENERATOR)


def whitening_of(bundle: Path) -> Whitening:
    """Measures mean and covariance of W on 50,000 codes of a bundle's generator, without faces."""
    return Whitening.of(sample_w(load_generator(bundle / GENERATOR), W_SAMPLES, 0).numpy())


def _inspect(args: argparse.Namespace) -> int:
    names = args.names or names_in(args.bundle / FOLDER)
    if not names:
        raise ValueError(f"no directions in {args.bundle / FOLDER}; python -m editing fit makes them")
    found = read_directions(args.bundle / FOLDER, names, _owner_of(args.bundle))
    for direction in found.values():
        print_line(_line(direction))
    return 0


def _line(direction: EditDirection) -> str:
    about, parts = direction.about, [f"σ {direction.sigma:.3f}"]
    if "held_out_accuracy" in about:
        parts += [
            f"held-out accuracy {about['held_out_accuracy']:.3f} ({about['faces_per_end']} faces per end)",
            f"target effect {about['target_effect']:.2f}, leakage {about['leakage']:.2f} at {about['measured_at']:+d}",
        ]
    if about.get("conditions"):
        parts.append(f"without {', '.join(about['conditions'])}")
    if about.get("from"):
        parts.append(about["from"])
    return f"{direction.name}: " + "; ".join(parts)


def _import(args: argparse.Namespace) -> int:
    try:
        array = np.load(args.file, allow_pickle=False)
    except FAILURES as error:
        raise WrongOption(f"{args.file}: expected a .npy array without objects ({format_error(error)})") from error
    with blame("--bundle"):
        generator = load_generator(args.bundle / GENERATOR)
    if not isinstance(array, np.ndarray) or array.size != generator.w_dim:
        found = array.shape if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{args.file}: expected a normal of {generator.w_dim} numbers for this generator, got {found}")
    sigma = float((sample_w(generator, W_SAMPLES, 0).numpy() @ unit_normal(array)).std())
    sha256 = _owner_of(args.bundle)
    return _write_new(import_interfacegan(array, args.new, sigma, sha256, generator.num_ws), args.bundle)


def _write_new(direction: EditDirection, bundle: Path) -> int:
    write_direction(direction, bundle / FOLDER / f"{direction.name}.npz")
    print_line(_line(direction))
    return 0


def _export(args: argparse.Namespace) -> int:
    sha256 = _owner_of(args.bundle)
    direction = read_directions(args.bundle / FOLDER, [args.name], sha256)[args.name]
    if args.file.suffix != ".npy":
        raise WrongOption(f"expected a file that ends in .npy, got {args.file}")
    with owned_file(args.file, args.overwrite) as partial, open(partial, "wb") as file:
        np.save(file, export_interfacegan(direction))
    print_line(f"{args.file}: a strength of 1 is {np.linalg.norm(direction.steps[0]):.4f} of its unit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
