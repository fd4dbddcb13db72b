"""Measures edits: what each changes of its own attribute, of the others and of the person, by a second classifier.

Examples:
    python benchmarks/editing.py --classifier runs/attributes_64_second/attributes.safetensors
    python benchmarks/editing.py --classifier FILE --generated 500 --real 200 --lr 16 --out results/edits
    python benchmarks/editing.py --classifier FILE --edits smile bangs --real 0

Faces are generated at truncation 1 with a seed of their own, or the point estimates of validation photos that were
downscaled to --lr px; these are projected, and edited as by `infer.py --edit`. A score is the probability that the
classifier gives when half of all faces have the attribute, so its range is 1 for rare attributes as well. Each edit has
a strength of 2 to the side where there is room: away from what most faces are ("young" is measured at -2). "Target" is
the mean change of its own score to that side; "leakage" the 90th percentile of the mean changes of other attributes,
without its synonyms (editing/names.py); "identity" the mean cosine between the faces before and after.
"Raw" is the step along the same hyperplane's normal, the same for all styles; "learned" what the direction's file says.

It writes edits.json, table.md and matrix.png: rows are edits, columns attributes, raw on top, learned below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.console import path_option
from data.faces import Faces
from data.figures import matrix_picture
from data.files import check_folder, owned_folder
from data.image_io import from_uint8, to_uint8
from data.operator import Downscale, back_project
from data.report import write_json
from data.splits import add_split_options
from editing.__main__ import whitening_of
from editing.apply import edited_target
from editing.direction import FOLDER, EditDirection, names_in, read_directions
from editing.hyperplane import Hyperplane, sample_w, step_of
from editing.learning import STRENGTH, Effect, rarer_side
from editing.names import attribute_of
from models.attributes import AttributeClassifier, load_attributes
from models.bundle import Bundle, load_bundle
from models.bundle_info import DEFAULT_BUNDLE, GENERATOR
from models.checkpoints import sha256_of
from models.device import use_deterministic_kernels
from models.encoder_base import Encoding
from models.face_embedder import FaceEmbedder, load_mobilefacenet

SEED = 7_000_000  # of the generated faces; directions are fitted and learned on others
AT_ONCE = 50


class Bench:
    """Faces of one kind, with their scores before any edit.

    Args:
        bundle: Synthesizes.
        classifier: Scores; not the one that labelled the directions' samples.
        identity: Compares persons, None to leave that out.
        encoding: Of N faces, with k = 1.
        lr: What they were encoded from (N, 3, s, s); None for faces that nobody encoded.
    """

    def __init__(
        self,
        bundle: Bundle,
        classifier: AttributeClassifier,
        identity: FaceEmbedder | None,
        encoding: Encoding,
        lr: Tensor | None = None,
    ) -> None:
        self.bundle, self.classifier, self.identity = bundle, classifier, identity
        self.encoding, self.lr = encoding, lr
        ws = encoding.ws
        self.before = self._look(ws.new_zeros(ws.shape[2:]))

    def images(self, offset: Tensor) -> Iterator[Tensor]:
        """Synthesizes the faces with an offset of their codes (L, D), as they are written: images (n, 3, R, R)."""
        ws, details = self.encoding
        for i in torch.arange(len(ws)).split(AT_ONCE):
            held = {r: tensor[i] for r, tensor in details.items()}
            before, after = (self.bundle.generate(Encoding(ws[i] + e, held))[:, 0] for e in (0 * offset, offset))
            if self.lr is not None:
                after = back_project(after, edited_target(self.lr[i].to(after), before, after))
            yield from_uint8(to_uint8(after))

    @torch.inference_mode()
    def _look(self, offset: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores (N, A) in [0, 1], and embeddings (N, 128)."""
        scores, persons = [], []
        for images in self.images(offset):
            scores.append(self.classifier.balanced(self.classifier(images)).sigmoid())
            if self.identity is not None:
                persons.append(self.identity(images))
        return torch.cat(scores), torch.cat(persons) if persons else None

    def measure(self, name: str, steps: np.ndarray) -> dict[str, Any]:
        """Measures an edit by its steps (L, D): its figures, see `summarize`, and the "changes" of all scores."""
        attribute, sign = attribute_of(name)
        side = rarer_side(float(self.classifier.rates[self.classifier.names.index(attribute)]), sign)
        scores, persons = self._look(side * STRENGTH * torch.from_numpy(steps).to(self.encoding.ws))
        identity = None
        if persons is not None and self.before[1] is not None:
            identity = float((persons * self.before[1]).sum(dim=1).mean())
        changes = (scores - self.before[0]).mean(dim=0).tolist()
        effect = Effect.of(name, dict(zip(self.classifier.names, changes, strict=True)), side)
        return summarize(effect) | {"identity": identity, "strength": side * STRENGTH, "changes": changes}


def summarize(effect: Effect) -> dict[str, Any]:
    """Turns an effect into "target", "leakage", their "ratio", the "largest" of the others, and the synonyms."""
    largest = max(effect.others, key=lambda other: abs(effect.others[other]))
    ratio = effect.leakage / effect.target if effect.target > 0 else float("inf")
    figures = {"target": effect.target, "leakage": effect.leakage, "ratio": ratio}
    return figures | {"largest": [largest, effect.others[largest]], "synonyms": effect.synonyms}


def measure(benches: dict[str, Bench], ways: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Measures all edits on all faces: by kind of faces, way ("raw", "learned") and edit, see `Bench.measure`."""
    results: dict[str, Any] = {}
    with tqdm(total=len(benches) * sum(len(edits) for edits in ways.values()), unit="edit", disable=None) as bar:
        for kind, bench in benches.items():
            results[kind] = {way: {} for way in ways}
            for way, edits in ways.items():
                for name, steps in edits.items():
                    results[kind][way][name] = bench.measure(name, steps)
                    bar.update()
    return results


def table(results: dict[str, Any]) -> str:
    """Writes the figures as tables in Markdown, one for each kind of faces."""
    lines = []
    for kind, ways in results.items():
        lines += [
            f"\n{kind}\n",
            "| edit | target, raw | target | leakage, raw | leakage | ratio | identity | largest |",
        ]
        lines.append("|---|---:|---:|---:|---:|---:|---:|---|")
        for name, c in ways["learned"].items():
            r = ways["raw"][name]
            person = "n/a" if c["identity"] is None else f"{c['identity']:.2f}"
            cells = [f"{r['target']:.2f}", f"{c['target']:.2f}", f"{r['leakage']:.3f}", f"{c['leakage']:.3f}"]
            cells += [f"{c['ratio']:.2f}", person, f"{c['largest'][0]} {c['largest'][1]:+.2f}"]
            lines.append(f"| {name} {c['strength']:+g} | {' | '.join(cells)} |")
    return "\n".join(lines).lstrip() + "\n"


def make_benches(bundle: Bundle, classifier: AttributeClassifier, args: argparse.Namespace) -> dict[str, Bench]:
    """Makes the faces that the options ask for: generated ones, and point estimates of photos."""
    try:
        identity = load_mobilefacenet().to(args.device)
    except FileNotFoundError as error:
        print(f"The identity similarity is left out. {error}", file=sys.stderr)
        identity = None
    benches = {}
    if args.generated:
        w = sample_w(bundle.generator, args.generated, SEED).to(args.device)
        ws = w[:, None, None].expand(-1, 1, bundle.generator.num_ws, -1)
        benches[f"{len(ws)} generated faces"] = Bench(bundle, classifier, identity, Encoding(ws, {}))
    if args.real:
        photos = Faces(args.data, bundle.resolution, args.real, split=args.split, part=args.part).images()
        lr = from_uint8(to_uint8(Downscale(args.lr)(photos)))
        benches[f"{len(lr)} photos, {args.lr} px"] = Bench(bundle, classifier, identity, bundle.encode(lr), lr)
    return benches


def raw_steps(directions: dict[str, EditDirection], bundle: Path) -> dict[str, np.ndarray]:
    """The steps (L, D) of one standard deviation that the directions' normals give, the same for all styles."""
    whitening = whitening_of(bundle)
    planes = {name: Hyperplane.of_w(d.normal, d.intercept, whitening) for name, d in directions.items()}
    return {name: np.tile(step_of(planes[name], [], whitening), (len(d.steps), 1)) for name, d in directions.items()}


def write_results(results: dict[str, Any], notes: dict[str, Any], out: Path, overwrite: bool = False) -> None:
    """Writes edits.json, table.md and matrix.png, see `data.files.owned_folder`."""
    pages = [
        (f"{kind}, {way}", [figures["changes"] for figures in ways[way].values()])
        for kind, ways in results.items()
        for way in ("raw", "learned")
    ]
    rows = [f"{name} {found['strength']:+g}" for name, found in next(iter(results.values()))["learned"].items()]
    picture = matrix_picture(pages, rows, [name.replace("_", " ") for name in notes["attributes"]])
    with owned_folder(out, overwrite) as partial:
        write_json({**notes, "results": results}, partial / "edits.json")
        (partial / "table.md").write_text(table(results), encoding="utf-8")
        picture.save(partial / "matrix.png")


def main(args: list[str] | None = None) -> None:
    """Measures, prints the table and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", type=Path, default=DEFAULT_BUNDLE)
    add(
        "--classifier", type=Path, required=True, help="the second classifier, of another seed, backbone and data order"
    )
    add("--edits", nargs="+", help="default: all of the bundle's directions")
    add("--generated", type=int, default=500, help="generated faces (default: %(default)s)")
    add("--real", type=int, default=200, help="photos (default: %(default)s)")
    add("--data", default="celeba128_val.zip", help="the photos (default: %(default)s)")
    add_split_options(parser)
    add("--lr", type=int, default=16, help="size in px of what is encoded (default: %(default)s)")
    add("--out", type=path_option, default=Path("results/edits"))
    add("--overwrite", action="store_true", help="replace what an earlier call wrote")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(args)
    try:
        check_folder(arguments.out, arguments.overwrite)  # before the work
    except ValueError as error:
        parser.error(f"--out: {error}")
    use_deterministic_kernels()
    bundle = load_bundle(arguments.bundle, arguments.device)
    classifier = load_attributes(arguments.classifier, arguments.device)
    folder, owner = arguments.bundle / FOLDER, bundle.info["parts"][GENERATOR]
    directions = read_directions(folder, arguments.edits or names_in(folder), owner)
    used = sha256_of(arguments.classifier)
    if any(direction.about.get("classifier_sha256") == used for direction in directions.values()):
        parser.error("--classifier: expected another one than the directions were learned with; it would judge itself")
    ways = {"raw": raw_steps(directions, arguments.bundle), "learned": {n: d.steps for n, d in directions.items()}}
    results = measure(make_benches(bundle, classifier, arguments), ways)
    notes = {"bundle": bundle.hash, "classifier_sha256": used, "strength": STRENGTH, "attributes": classifier.names}
    write_results(results, notes, arguments.out, arguments.overwrite)
    print(table(results))


if __name__ == "__main__":
    main()
