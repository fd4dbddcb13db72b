"""The referee: all methods on the same faces in one run, one table out.

Examples:
    python evaluate.py                                            # 200 validation faces, 16 and 8 px, default bundle
    python evaluate.py --faces 2000 --lr 16 --out results/full    # with the Fréchet distance (1000 faces or more)
    python evaluate.py --bundle runs/mine --data my_faces.zip --k 8

Every face is downscaled by the project's operator and rounded to 8 bit; each method gets that picture and nothing
else. Its pictures are measured as they would be written: clamped to [-1, 1] and rounded to 8 bit. It writes `table.md`,
`results.json` (two runs of one command differ in its key "timing" alone) and one `faces_<LR>.png` per LR size into
--out. These pictures show faces from the data: mind its licence before they are passed on.

The best guess is a method's first candidate. What the columns say:
    PSNR, SSIM, LPIPS, identity    the best guess beside the truth; LPIPS on SqueezeNet, identity as the cosine of
                                   MobileFaceNet embeddings
    LPIPS / bicubic                mean LPIPS over that of bicubic interpolation at the same LR size
    error, within                  downscaling error of the best guess, and share of faces where it is at most 1e-3
    diversity                      mean pairwise LPIPS among the candidates that count: those whose downscaling error
                                   is at most twice the best guess's; a face where fewer than two count adds 0
    count                          share of all candidates, best guess included, that count
    fd_vgg11 or fid                Fréchet distance between best guesses and truths; fd_vgg11 is seen by no loss
    seconds                        median time for one face, one candidate, batch 1, without start-up
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from data.faces import Faces
from data.operator import Downscale, downscaling_error, upscale_bicubic
from data.reading import MIN_SIDE, from_uint8, to_uint8
from losses.perceptual import LPIPS
from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from models.identity import Identity
from training.frechet import frechet_metric

EPSILON = 1e-3  # a face whose downscaling error is at most this explains the LR picture
BATCH = 16
FRECHET_FACES = 1000  # below, the covariance of the features is too uncertain
TIMED_FACES, WARM_UP = 20, 3
FIGURE_FACES, CELL = 6, 128
OPERATOR = "separable bicubic, a = -0.5, antialiased (4·factor taps, PULSE's offsets, reflected borders); LR in 8 bit"

Method = Callable[[Tensor, int, np.random.Generator], Tensor]
"""Maps LR pictures (B, 3, s, s) in [-1, 1], k and random numbers to candidates (B, c, 3, R, R), 1 ≤ c ≤ k."""


def make_bicubic(bundle: Bundle) -> Method:
    """Makes bicubic interpolation, the baseline; it has one candidate whatever k."""
    return lambda lr, k, rng: upscale_bicubic(lr, bundle.resolution)[:, None]


def make_ours(bundle: Bundle) -> Method:
    """Makes the bundle's encoder and generator."""
    return lambda lr, k, rng: bundle.upsample(lr, k, rng)[0]


METHODS: dict[str, Callable[[Bundle], Method]] = {"bicubic": make_bicubic, "ours": make_ours}


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Measures the peak signal-to-noise ratio, −10 log₁₀ of the mean squared error in [0, 1].

    Args:
        images: Images (B, C, H, W) in [-1, 1].
        truth: Images of the same shape.

    Returns:
        Ratios (B,) in dB, inf for equal images.
    """
    return -10 * ((images - truth) / 2).square().mean(dim=(1, 2, 3)).log10()


def candidates_that_count(errors: Tensor) -> Tensor:
    """Says which candidates explain the LR picture about as well as the best guess, e_j ≤ 2 e_0.

    Args:
        errors: Downscaling errors (B, k), the best guess first.

    Returns:
        Truth values (B, k); the best guess always counts.
    """
    return errors <= 2 * errors[:, :1]


def diversity(lpips: LPIPS, features: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Measures the mean pairwise LPIPS among the candidates that count.

    Args:
        lpips: The distance.
        features: Its features of the candidates, each (B, k, C_l, H_l, W_l).
        counts: Which candidates count (B, k).

    Returns:
        Distances (B,), 0 where fewer than two candidates count.
    """
    total = torch.zeros(len(counts), device=counts.device)  # (B,)
    pairs = torch.zeros_like(total)
    for i, j in itertools.combinations(range(counts.shape[1]), 2):
        both = counts[:, i] & counts[:, j]  # (B,)
        total += both * lpips.distance([f[:, i] for f in features], [f[:, j] for f in features])
        pairs += both
    return total / pairs.clamp(min=1)


def batches(faces: Faces, size: int, device: torch.device) -> Iterator[Tensor]:
    """Gives the faces in order, uint8 (B, 3, R, R)."""
    for start in range(0, len(faces), size):
        yield torch.stack([faces[i] for i in range(start, min(start + size, len(faces)))]).to(device)


def low_resolution(truth: Tensor, size: int) -> Tensor:
    """Makes LR pictures (B, 3, s, s) in [-1, 1] with 8-bit values from faces, uint8 (B, 3, R, R)."""
    return from_uint8(to_uint8(Downscale(size)(from_uint8(truth))))


def as_written(images: Tensor, batch: int, resolution: int) -> Tensor:
    """Clamps candidates (B, c, 3, R, R) and rounds them to 8 bit.

    Args:
        images: What a method returned.
        batch: Faces B that it was given.
        resolution: Size R that they must have.

    Returns:
        Pictures (B, c, 3, R, R), uint8.

    Raises:
        ValueError: If the method returned another shape, or numbers that are not finite.
    """
    expected = (batch, images.shape[1] if images.ndim == 5 else 1, 3, resolution, resolution)
    if images.shape != expected or images.shape[1] < 1:
        raise ValueError(f"Expected candidates (B, c, 3, R, R) like {expected}, got {tuple(images.shape)}.")
    if not images.isfinite().all():
        raise ValueError("Expected finite pictures, got NaN or inf; look at the weights of the method.")
    return to_uint8(images.flatten(0, 1)).unflatten(0, images.shape[:2])


@dataclass
class Outcome:
    """What one method did at one LR size.

    Attributes:
        means: Mean over faces by the name of the measure; None where it does not apply or cannot be measured.
        shown: Pictures (n, 1 or 2, 3, R, R), uint8: best guess and second candidate of the first faces.
    """

    means: dict[str, float | None]
    shown: Tensor


class Referee:
    """Measures methods; holds the faces and the networks that measure.

    Args:
        faces: The truths.
        device: Where everything is computed.

    Raises:
        FileNotFoundError: If LPIPS has no weights. Other networks without weights leave their measure out and warn.
    """

    def __init__(self, faces: Faces, device: torch.device) -> None:
        self.faces, self.device = faces, device
        self.lpips = LPIPS().to(device)
        self.identity: Identity | None = None
        self.frechet: tuple[str, FrechetInceptionDistance] | None = None
        try:
            self.identity = Identity().to(device)
        except FileNotFoundError as error:
            warnings.warn(f"The identity similarity is left out (n/a). {error}", stacklevel=2)
        if len(faces) >= FRECHET_FACES:
            try:
                self._prepare_frechet()
            except (OSError, ImportError) as error:  # a download or a package that is not to be had
                warnings.warn(f"The Fréchet distance is left out (n/a). {error}", stacklevel=2)

    @torch.no_grad()
    def _prepare_frechet(self) -> None:
        name, metric = frechet_metric()
        metric = metric.to(self.device)
        for truth in batches(self.faces, BATCH, self.device):
            metric.update(truth, real=True)  # kept through reset()
        self.frechet = name, metric

    @property
    def networks(self) -> dict[str, str | None]:
        """The networks by the measure they serve; None for a measure that is left out."""
        return {
            "lpips": "LPIPS 0.1, SqueezeNet 1.1",
            "identity": "MobileFaceNet y1, cosine" if self.identity else None,
            "frechet": self.frechet[0] if self.frechet else None,
        }

    @torch.no_grad()
    def judge(self, method: Method, lr_size: int, k: int, seed: int, progress: tqdm | None = None) -> Outcome:
        """Measures one method at one LR size, in batches.

        Args:
            method: The method.
            lr_size: Width s of the LR pictures in pixels.
            k: Candidates per face to ask for.
            seed: Seed of the random numbers, which depend on the LR size too, and on nothing else.
            progress: A bar to move on by the number of faces.

        Returns:
            Means and pictures.

        Raises:
            ValueError: If the method returns pictures of another shape, or not finite.
        """
        rng = np.random.default_rng([seed, lr_size])
        values: dict[str, list[Tensor]] = defaultdict(list)
        shown: list[Tensor] = []
        if self.frechet:
            self.frechet[1].reset()
        for truth in batches(self.faces, BATCH, self.device):  # (B, 3, R, R)
            lr = low_resolution(truth, lr_size)
            pictures = as_written(method(lr, k, rng), len(truth), self.faces.resolution)  # (B, c, 3, R, R)
            for name, value in self._measure(pictures, truth, lr).items():
                values[name].append(value.double().cpu())
            if self.frechet:
                self.frechet[1].update(pictures[:, 0], real=False)
            if sum(map(len, shown)) < FIGURE_FACES:
                shown.append(pictures[:FIGURE_FACES, :2].cpu())
            if progress is not None:
                progress.update(len(truth))
        means: dict[str, float | None] = {name: torch.cat(value).mean().item() for name, value in values.items()}
        if self.frechet:
            means["frechet"] = self.frechet[1].compute().item()
        return Outcome(means, torch.cat(shown)[:FIGURE_FACES])

    def _measure(self, pictures: Tensor, truth: Tensor, lr: Tensor) -> dict[str, Tensor]:
        """Measures a batch: pictures (B, c, 3, R, R) and truth (B, 3, R, R) in uint8; values (B,)."""
        images, faces = from_uint8(pictures), from_uint8(truth)
        best, c = images[:, 0], images.shape[1]
        errors = downscaling_error(images.flatten(0, 1), lr.repeat_interleave(c, 0), Downscale(lr.shape[-1]))
        errors = errors.unflatten(0, (-1, c))  # (B, c)
        features = [f.unflatten(0, (-1, c)) for f in self.lpips.features(images.flatten(0, 1))]
        ssim = structural_similarity_index_measure((best + 1) / 2, (faces + 1) / 2, reduction="none", data_range=1.0)
        assert isinstance(ssim, Tensor)
        values = {
            "psnr": psnr(best, faces),
            "ssim": ssim,
            "lpips": self.lpips.distance([f[:, 0] for f in features], self.lpips.features(faces)),
            "error": errors[:, 0],
            "within": (errors[:, 0] <= EPSILON).float(),
        }
        if self.identity:
            values["identity"] = (self.identity(best) * self.identity(faces)).sum(dim=1)
        if c > 1:
            counts = candidates_that_count(errors)
            values["diversity"] = diversity(self.lpips, features, counts)
            values["count"] = counts.float().mean(dim=1)
        return values

    @torch.no_grad()
    def seconds(self, method: Method, lr_size: int) -> float:
        """Takes the median time in seconds for one face, one candidate, batch 1, after warming up."""
        rng, times = np.random.default_rng(0), []
        truths = [truth for truth, _ in zip(batches(self.faces, 1, self.device), range(TIMED_FACES), strict=False)]
        for i in range(-WARM_UP, len(truths)):
            lr = low_resolution(truths[max(i, 0)], lr_size)
            self._synchronize()
            start = time.perf_counter()
            method(lr, 1, rng)
            self._synchronize()
            if i >= 0:
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# Title of the column, name of the measure, format.
COLUMNS = (
    ("PSNR", "psnr", ".2f"),
    ("SSIM", "ssim", ".3f"),
    ("LPIPS", "lpips", ".4f"),
    ("LPIPS / bicubic", "lpips_over_bicubic", ".3f"),
    ("identity", "identity", ".3f"),
    ("error", "error", ".2e"),
    ("within", "within", ".1%"),
    ("diversity", "diversity", ".4f"),
    ("count", "count", ".1%"),
)


def table(results: Mapping[str, Any]) -> str:
    """Writes the Markdown table of the contents of results.json.

    Args:
        results: What `main` collects.

    Returns:
        Lines of text; "–" where a measure does not apply, "n/a" where its network is missing.
    """
    columns = list(COLUMNS)
    if results["faces"] >= FRECHET_FACES:
        columns.append((results["networks"]["frechet"] or "Fréchet", "frechet", ".4f"))
    missing = {name for name, network in results["networks"].items() if network is None}
    lines = [
        f"{results['faces']} faces of {results['data']}, {results['resolution']} px, k = {results['k']}, "
        f"seed {results['seed']}, bundle {results['bundle']['name']} ({results['bundle']['hash'][:12]})",
        "",
        "| LR | method | " + " | ".join(title for title, _, _ in columns) + " | seconds |",
        "|---|---|" + "---:|" * (len(columns) + 1),
    ]
    for lr, methods in results["results"].items():
        for method, means in methods.items():
            cells = [
                "n/a" if name in missing else "–" if means.get(name) is None else format(float(means[name]), style)
                for _, name, style in columns
            ]
            seconds = results["timing"]["seconds_per_face"][lr][method]
            lines.append(f"| {lr} px | {method} | {' | '.join(cells)} | {seconds:.4f} |")
    return "\n".join(lines) + "\n"


def figure(truth: Tensor, lr: Tensor, outcomes: Mapping[str, Outcome]) -> Image.Image:
    """Draws the first faces: LR input, each method's best guess and second candidate, truth.

    Args:
        truth: Faces (n, 3, R, R), uint8.
        lr: Their LR pictures (n, 3, s, s), uint8.
        outcomes: By method.

    Returns:
        The picture, one row per face under a row of titles.
    """
    columns = [(f"input {lr.shape[-1]} px", lr)]
    for method, outcome in outcomes.items():
        for number, pictures in enumerate(outcome.shown.unbind(dim=1), start=1):
            columns.append((method if number == 1 else f"{method}, no. {number}", pictures))
    columns.append(("truth", truth))
    cell, gap, head = max(CELL, truth.shape[-1]), 4, 18
    canvas = Image.new("RGB", (len(columns) * (cell + gap), head + len(truth) * (cell + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for x, (title, pictures) in enumerate(columns):
        draw.text((x * (cell + gap) + 2, 3), title, fill="black")
        for y, picture in enumerate(pictures):
            image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            image = image.resize((cell, cell), Image.Resampling.NEAREST)  # shows the pixels as they are
            canvas.paste(image, (x * (cell + gap), head + y * (cell + gap)))
    return canvas


def compare(
    bundle: Bundle, referee: Referee, args: argparse.Namespace
) -> tuple[dict[str, Any], dict[int, Image.Image]]:
    """Lets all methods run at all LR sizes.

    Args:
        bundle: What the methods are made of.
        referee: Measures them.
        args: The command line.

    Returns:
        Measures and seconds by LR size and method, under "results" and "timing"; one figure per LR size.
    """
    results: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    figures = {}
    truth = next(batches(referee.faces, FIGURE_FACES, referee.device))
    total = len(args.lr) * len(args.methods) * len(referee.faces)
    with tqdm(total=total, unit="face", disable=None) as progress:
        for size in args.lr:
            outcomes: dict[str, Outcome] = {}
            seconds[str(size)] = {}
            for name in args.methods:
                progress.set_description(f"{name}, {size} px")
                method = METHODS[name](bundle)
                outcomes[name] = referee.judge(method, size, args.k, args.seed, progress)
                seconds[str(size)][name] = referee.seconds(method, size)
            baseline = outcomes["bicubic"].means["lpips"] if "bicubic" in outcomes else None
            for outcome in outcomes.values():
                lpips = outcome.means["lpips"]
                outcome.means["lpips_over_bicubic"] = lpips / baseline if lpips is not None and baseline else None
            results[str(size)] = {name: outcome.means for name, outcome in outcomes.items()}
            lr = to_uint8(low_resolution(truth, size))
            figures[size] = figure(truth.cpu(), lr.cpu(), outcomes)
    timing = {"seconds_per_face": seconds, "device": referee.device.type, "threads": torch.get_num_threads()}
    return {"results": results, "timing": timing}, figures


def json_ready(value: Any) -> Any:
    """Replaces inf, which JSON cannot hold, by "inf" in nested dicts."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="folder of the bundle to measure")
    parser.add_argument("--data", default="celeba128_val.zip", help="zip or folder of square faces (%(default)s)")
    parser.add_argument("--faces", type=int, default=200, help="use the first so many in sorted order (%(default)s)")
    parser.add_argument("--lr", type=int, nargs="+", default=[16, 8], metavar="PX", help="LR sizes (16 8)")
    parser.add_argument("--k", type=int, default=4, help="candidates per face (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="which to compare (all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the candidates (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where there is one (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for what is written (%(default)s)")
    args = parser.parse_args(argv)
    for name, least in (("faces", 1), ("k", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"argument --{name}: expected at least {least}, got {getattr(args, name)}")
    if min(args.lr) < MIN_SIDE:
        parser.error(f"argument --lr: expected at least {MIN_SIDE} px, got {min(args.lr)}")
    args.lr, args.methods = list(dict.fromkeys(args.lr)), list(dict.fromkeys(args.methods))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        parser.error(f"argument --device: {args.device} cannot be used ({error}); try --device cpu")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments in place of those of the process.

    Returns:
        Exit status: 0, or 1 with a message when the bundle, the data or LPIPS are missing or do not fit.
    """
    args = parse(argv)
    try:
        bundle = load_bundle(args.bundle, args.device)
        smallest, largest = bundle.lr_sizes
        if min(args.lr) < smallest or max(args.lr) > largest:
            raise ValueError(f"Expected --lr from {smallest} to {largest} px for {bundle.name!r}, got {args.lr}.")
        faces = Faces(args.data, bundle.resolution, limit=args.faces)
        referee = Referee(faces, torch.device(args.device))
    except (ValueError, FileNotFoundError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    measured, figures = compare(bundle, referee, args)
    results = {
        "command": shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)]),
        "bundle": {"name": bundle.name, "hash": bundle.hash},
        "data": faces.source.name,
        "resolution": bundle.resolution,
        "faces": len(faces),
        "k": args.k,
        "seed": args.seed,
        "operator": OPERATOR,
        "epsilon": EPSILON,
        "networks": referee.networks,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        **measured,
    }
    text = table(results)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    document = json.dumps(json_ready(results), indent=2, ensure_ascii=False, allow_nan=False)
    (args.out / "results.json").write_text(document + "\n", encoding="utf-8")
    for size, picture in figures.items():
        picture.save(args.out / f"faces_{size}.png")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
