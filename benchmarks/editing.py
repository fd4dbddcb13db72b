"""Measures edits: what each changes of its own attribute, of the others and of the person, by a second classifier.

Examples:
    python benchmarks/editing.py --classifier runs/attributes_64_second/attributes.safetensors
    python benchmarks/editing.py --classifier FILE --generated 500 --real 200 --lr 16 --out results/edits
    python benchmarks/editing.py --classifier FILE --edits smile bangs --real 0

Faces are drawn at truncation 1 with a seed of their own, or photos of validation people, downscaled to --lr px and
encoded. A score is the probability that the classifier gives when half of all faces have the attribute, so its range
is 1 for rare attributes as well. Each edit goes by a strength of 2 to the side where there is room: away from what most
faces are ("young" is measured at -2). "Own" is the mean change of its own score to that side; "drift" the 90th
percentile of the mean changes of the other attributes, its synonyms (editing/names.py) listed apart. "Raw" is the step
along the same hyperplane's normal, the same in all layers; "fitted" what the boundary's file says.

It writes edits.json, table.md and matrix.png: rows are edits, columns attributes, raw on top, as fitted below.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.faces import Faces
from data.image_io import from_uint8, to_uint8
from data.operator import Downscale
from data.pictures import matrix_picture
from data.report import write_json
from data.splits import add_split_options
from editing.boundaries import raw_direction, whitening_of
from editing.boundary import FOLDER, Boundary, names_in, read_boundaries
from editing.choosing import PERCENTILE, rarer_side
from editing.names import attribute_of, synonyms_of
from editing.sampling import sample_w
from models.attributes import AttributeClassifier, load_attributes
from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from models.bundle_info import GENERATOR
from models.checkpoints import sha256_of
from models.determinism import use_deterministic_kernels
from models.identity import Identity

STRENGTH = 2.0
SEED = 7_000_000  # of the generated faces; boundaries are fitted and chosen on others
AT_ONCE = 50


@dataclass(frozen=True)
class Effect:
    """What an edit did to a set of faces.

    Attributes:
        changes: Mean change of every attribute's score (A,), in [-1, 1].
        identity: Mean similarity of the person before and after, None without the network.
    """

    changes: np.ndarray
    identity: float | None


class Bench:
    """Faces of one kind, with their scores before any edit.

    Args:
        bundle: Draws.
        classifier: Scores; not the one that labelled the boundaries' samples.
        identity: Compares persons, None to leave that out.
        ws: Codes (N, L, D).
    """

    def __init__(self, bundle: Bundle, classifier: AttributeClassifier, identity: Identity | None, ws: Tensor) -> None:
        self.generator, self.classifier, self.identity, self.ws = bundle.generator, classifier, identity, ws
        self.before = self._look(ws)

    @torch.inference_mode()
    def _look(self, ws: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores (N, A) in [0, 1], and embeddings (N, 128), of the pictures as they are written."""
        scores, persons = [], []
        for part in ws.split(AT_ONCE):
            images = from_uint8(to_uint8(self.generator.synthesis(part, noise_mode="const")))
            scores.append(self.classifier.balanced(self.classifier(images)).sigmoid())
            if self.identity is not None:
                persons.append(self.identity(images))
        return torch.cat(scores), torch.cat(persons) if persons else None

    def effect(self, direction: np.ndarray, layers: tuple[int, int], strength: float) -> Effect:
        """Measures an edit: its step (D,), the styles it changes, and how far it goes."""
        ws = self.ws.clone()
        ws[:, layers[0] : layers[1]] += strength * torch.from_numpy(direction).to(ws)
        scores, persons = self._look(ws)
        similarity = None
        if persons is not None and self.before[1] is not None:
            similarity = float((persons * self.before[1]).sum(dim=1).mean())
        return Effect((scores - self.before[0]).mean(dim=0).cpu().numpy(), similarity)


def summarise(name: str, effect: Effect, names: tuple[str, ...], side: int) -> dict[str, Any]:
    """Turns the effect of an edit into its figures.

    Args:
        name: Of the edit.
        effect: What it did.
        names: Of the attributes.
        side: +1 or −1, to which it went.

    Returns:
        "own", "drift" (90th percentile), "ratio", "largest" drift with its attribute, "identity", and the changes of
        the synonyms.
    """
    attribute, sign = attribute_of(name)
    changes = dict(zip(names, effect.changes.tolist(), strict=True))
    own = changes.pop(attribute) * sign * side
    synonyms = {other: changes.pop(other) for other in sorted(synonyms_of(name))}
    drift = float(np.percentile(np.abs(list(changes.values())), PERCENTILE))
    largest = max(changes, key=lambda other: abs(changes[other]))
    return {
        "own": own,
        "drift": drift,
        "ratio": drift / own if own > 0 else float("inf"),
        "largest": [largest, changes[largest]],
        "identity": effect.identity,
        "synonyms": synonyms,
    }


def real_codes(bundle: Bundle, photos: Tensor, lr_size: int) -> Tensor:
    """Encodes photos (N, 3, R, R): the best guesses (N, L, D) for their downscaled pictures."""
    lr = from_uint8(to_uint8(Downscale(lr_size)(photos)))
    return torch.cat([bundle.encode(part)[:, 0] for part in lr.split(AT_ONCE)])


def measure(
    benches: dict[str, Bench], boundaries: dict[str, Boundary], raw: dict[str, np.ndarray], names: tuple[str, ...]
) -> dict[str, Any]:
    """Measures all edits on all faces, raw and as fitted.

    Args:
        benches: By the kind of faces.
        boundaries: By the name of the edit.
        raw: Their directions (D,) without conditions.
        names: Of the attributes.

    Returns:
        By kind of faces, "raw" or "fitted", and edit: the figures of `summarise` and all "changes".
    """
    results: dict[str, Any] = {}
    total = 2 * len(benches) * len(boundaries)
    with tqdm(total=total, unit="edit", disable=None) as bar:
        for kind, bench in benches.items():
            results[kind] = {"raw": {}, "fitted": {}}
            for name, boundary in boundaries.items():
                attribute, sign = attribute_of(name)
                side = rarer_side(float(bench.classifier.rates[names.index(attribute)]), sign)
                everything = (0, bench.generator.num_ws)
                ways = {"raw": (raw[name], everything), "fitted": (boundary.direction, boundary.layers)}
                for way, (direction, layers) in ways.items():
                    effect = bench.effect(direction, layers, side * STRENGTH)
                    figures = summarise(name, effect, names, side)
                    figures |= {"strength": side * STRENGTH, "changes": effect.changes.tolist()}
                    results[kind][way][name] = figures
                    bar.update()
    return results


def table(results: dict[str, Any]) -> str:
    """Writes the figures as tables in Markdown, one for each kind of faces."""
    lines = []
    for kind, ways in results.items():
        lines += [f"\n{kind}\n", "| edit | own, raw | own | drift, raw | drift | drift / own | identity | largest |"]
        lines.append("|---|---:|---:|---:|---:|---:|---:|---|")
        for name, c in ways["fitted"].items():
            r = ways["raw"][name]
            person = "n/a" if c["identity"] is None else f"{c['identity']:.2f}"
            lines.append(
                f"| {name} {c['strength']:+g} | {r['own']:.2f} | {c['own']:.2f} | {r['drift']:.3f} | {c['drift']:.3f} "
                f"| {c['ratio']:.2f} | {person} | {c['largest'][0]} {c['largest'][1]:+.2f} |"
            )
    return "\n".join(lines).lstrip() + "\n"


def make_benches(bundle: Bundle, classifier: AttributeClassifier, args: argparse.Namespace) -> dict[str, Bench]:
    """Makes the faces that the options ask for: generated ones, and encoded photos."""
    try:
        identity = Identity().to(args.device)
    except FileNotFoundError as error:
        print(f"The identity similarity is left out. {error}", file=sys.stderr)
        identity = None
    benches = {}
    if args.generated:
        w = sample_w(bundle.generator, args.generated, SEED).to(args.device)
        ws = w[:, None].expand(-1, bundle.generator.num_ws, -1)
        benches[f"{len(ws)} generated faces"] = Bench(bundle, classifier, identity, ws)
    if args.real:
        photos = Faces(args.data, bundle.resolution, args.real, split=args.split, part=args.part).images()
        ws = real_codes(bundle, photos, args.lr)
        benches[f"{len(ws)} encoded photos, {args.lr} px"] = Bench(bundle, classifier, identity, ws)
    return benches


def write_results(results: dict[str, Any], notes: dict[str, Any], out: Path) -> None:
    """Writes edits.json, table.md and matrix.png."""
    out.mkdir(parents=True, exist_ok=True)
    write_json({**notes, "results": results}, out / "edits.json")
    (out / "table.md").write_text(table(results), encoding="utf-8")
    pages = [
        (f"{kind}, {way}", [figures["changes"] for figures in ways[way].values()])
        for kind, ways in results.items()
        for way in ("raw", "fitted")
    ]
    rows = [f"{name} {found['strength']:+g}" for name, found in next(iter(results.values()))["fitted"].items()]
    matrix_picture(pages, rows, [name.replace("_", " ") for name in notes["attributes"]]).save(out / "matrix.png")


def main(args: list[str] | None = None) -> None:
    """Measures, prints the table and writes the files.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", type=Path, default=DEFAULT_BUNDLE)
    add(
        "--classifier", type=Path, required=True, help="the second classifier, of another seed, backbone and data order"
    )
    add("--edits", nargs="+", help="default: all of the bundle's boundaries")
    add("--generated", type=int, default=500, help="generated faces (default: %(default)s)")
    add("--real", type=int, default=200, help="encoded photos (default: %(default)s)")
    add("--data", default="celeba128_val.zip", help="the photos (default: %(default)s)")
    add_split_options(parser)
    add("--lr", type=int, default=16, help="size in px of what is encoded (default: %(default)s)")
    add("--out", type=Path, default=Path("results/edits"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(args)
    use_deterministic_kernels()
    bundle = load_bundle(arguments.bundle, arguments.device)
    classifier = load_attributes(arguments.classifier, arguments.device)
    folder, owner = arguments.bundle / FOLDER, bundle.info["parts"][GENERATOR]
    boundaries = read_boundaries(folder, arguments.edits or names_in(folder), owner)
    used = sha256_of(arguments.classifier)
    if any(boundary.about.get("classifier_sha256") == used for boundary in boundaries.values()):
        parser.error("--classifier: expected another one than the boundaries were fitted with; it would judge itself")
    whitening = whitening_of(arguments.bundle)
    raw = {name: raw_direction(boundary, whitening) for name, boundary in boundaries.items()}
    results = measure(make_benches(bundle, classifier, arguments), boundaries, raw, classifier.names)
    notes = {"bundle": bundle.hash, "classifier_sha256": used, "strength": STRENGTH, "attributes": classifier.names}
    write_results(results, notes, arguments.out)
    print(table(results))


if __name__ == "__main__":
    main()
