"""Runs every method in every condition on the same faces, batch by batch, and collects what the metrics say."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.figures import strip_sheet
from data.image_io import from_uint8, to_uint8
from data.operator import back_project
from evaluation.cache import Cache, Processes
from evaluation.methods import Method
from evaluation.metrics import MetricSuite, Values, attribute_rates, lr_psnr, summarize
from evaluation.truth import Condition, TruthSet
from models.bundle import Bundle

BATCH = 16
TIMED_FACES, WARM_UP = 20, 3
SLOW = 1.0  # seconds; a method that takes longer needs no more warming up
TIMED_SECONDS = 20.0  # a slow method is timed on fewer faces
SHOWN_FACES, SHOWN_SAMPLES = 8, 5
PROJECTED = "+projection"  # ends the name of a row


def project(images: Tensor, lr: Tensor, noise_ratio: Tensor) -> Tensor:
    """Projects samples (B, k, 3, R, R) onto inputs (B, 3, s, s), as far as these are not noise; in [-1, 1]."""
    k = images.shape[1]
    ratio = noise_ratio.repeat_interleave(k) if noise_ratio.any() else None
    return back_project(images.flatten(0, 1), lr.repeat_interleave(k, dim=0), noise_ratio=ratio).view_as(images)


def noise_ratio(bundle: Bundle, lr: Tensor) -> Tensor:
    """Gives the estimated σ²/τ² of inputs (B, 3, s, s), on which their projection depends; (B,), 0 for clean ones."""
    ratio = bundle.noise_ratio(bundle.encoder.noise_level(lr))
    return torch.zeros(len(lr), device=lr.device) if ratio is None else ratio


@dataclass
class Outcome:
    """One row of the table in one condition.

    Attributes:
        means: Mean over faces by the name of the measure, see `evaluation.metrics.summarize`.
        shown: Pictures (n, c, 3, R, R), uint8: the first samples of the first faces.
        seconds: Median time for one face, one sample, batch 1.
        faces: What was measured per face, by name, and its place among all faces, `index` (N,).
    """

    means: dict[str, Any]
    shown: Tensor
    seconds: float
    faces: Values = field(repr=False, default_factory=dict)


@dataclass
class Runner:
    """Runs methods and measures them."""

    truth: TruthSet  # the faces
    suite: MetricSuite
    cache: Cache
    processes: Processes
    k: int  # samples per face to ask for
    seed: int  # of the samples and degradations
    recipes: Mapping[str, str]  # by method, see `evaluation.methods.recipe_hash`
    bundle: Bundle  # estimates the noise of inputs, which their projection leaves out
    rows: str = "both"  # of each method: "both", "without", or "only" with projection

    def rows_of(self, name: str) -> list[str]:
        """Names the rows of a method."""
        return [name] * (self.rows != "only") + [name + PROJECTED] * (self.rows != "without")

    def entry(self, row: str, condition: Condition) -> str:
        """Names a row in a condition by all it depends on."""
        return f"{condition.name}-{row}-{self.recipes[row.removesuffix(PROJECTED)][:16]}"

    @torch.no_grad()
    def run(self, name: str, method: Method, condition: Condition, progress: tqdm | None = None) -> None:
        """Runs one method on this process's share of the faces, but for what was done before."""
        for part in self.processes.share(len(self.truth), BATCH):
            truth, indices = self.truth.batch(part, self.suite.device)
            lr, clean = condition.inputs(truth, self.seed, indices)
            ratio = noise_ratio(self.bundle, lr)
            wanted = [row for row in self.rows_of(name) if not self._has(row, condition, part, ratio)]
            if wanted:
                raw, nfe = method(lr, self.k, self.seed)
            for row in wanted:
                images = project(raw, lr, ratio) if row.endswith(PROJECTED) else raw
                values = self.suite.measure(from_uint8(truth), images, lr)
                values |= {"lr_psnr_clean": lr_psnr(images, clean).cpu(), "nfe": nfe.float().cpu(), "index": indices}
                values |= {"shown": to_uint8(images[indices < SHOWN_FACES, :SHOWN_SAMPLES]).cpu()}
                self.cache.write(self.entry(row, condition), part, values | {"noise_ratio": ratio.cpu()})
            if progress is not None:
                progress.update(part.stop - part.start)

    def _has(self, row: str, condition: Condition, part: slice, ratio: Tensor) -> bool:
        """Whether a batch was measured, and where it was projected, under the same estimate of the noise."""
        entry = self.entry(row, condition)
        if not self.cache.has(entry, part) or not row.endswith(PROJECTED):
            return self.cache.has(entry, part)
        return torch.equal(self.cache.read_batch(entry, part)["noise_ratio"], ratio.cpu())

    # ---------------------------------------------------------------- afterwards

    def outcome(self, row: str, method: Method, condition: Condition) -> Outcome:
        """Puts together what all processes measured of one row, and takes its time unless that was done before."""
        values = self.cache.read(self.entry(row, condition), len(self.truth), BATCH)
        shown = values.pop("shown")
        means: dict[str, Any] = summarize(values) | {"nfe": float(values["nfe"].mean())}
        means["lr_psnr_clean"] = float(values["lr_psnr_clean"].double().mean())
        if self.suite.attributes is not None:
            means["attributes"] = attribute_rates(values, self.suite.attributes.names)
        return Outcome(means, shown, self._seconds(row, method, condition), values)

    def _seconds(self, row: str, method: Method, condition: Condition) -> float:
        """Gives the time for one face, as it was taken before, or takes it."""
        name, size = row.removesuffix(PROJECTED), self.truth.faces.resolution
        times = {f"seconds-{self.entry(name, condition)}": lambda lr: method(lr, 1, self.seed).images}
        if row != name:
            blank = torch.zeros(1, 1, 3, size, size, device=self.suite.device)
            times[f"seconds-{condition.name}{PROJECTED}"] = lambda lr: project(blank, lr, noise_ratio(self.bundle, lr))
        for key, step in times.items():
            if self.cache.note(key) is None:
                self.cache.note(key, self.seconds(step, condition))
        return sum(self.cache.note(key) or 0.0 for key in times)

    @torch.no_grad()
    def seconds(self, step: Callable[[Tensor], Tensor], condition: Condition) -> float:
        """Takes the median time in seconds of a step from one LR face (1, 3, s, s) to images, after warming up."""
        for _ in range(WARM_UP):
            if self._time(step, condition, 0) > SLOW:
                break
        times: list[float] = []
        for place in range(min(len(self.truth), TIMED_FACES)):
            times.append(self._time(step, condition, place))
            if sum(times) > TIMED_SECONDS:
                break
        return statistics.median(times)

    def _time(self, step: Callable[[Tensor], Tensor], condition: Condition, place: int) -> float:
        truth, indices = self.truth.batch(slice(place, place + 1), self.suite.device)
        lr, _ = condition.inputs(truth, self.seed, indices)
        start = time.perf_counter()
        step(lr).cpu()  # waits for the device
        return time.perf_counter() - start

    def figure(self, condition: Condition, shown: Mapping[str, Tensor]) -> Image.Image:
        """Plots the first faces: the input, what each row of the table made of it (`Outcome.shown`), and the truth."""
        count = len(next(iter(shown.values())))
        truth, indices = self.truth.batch(slice(0, count), self.suite.device)
        lr, _ = condition.inputs(truth, self.seed, indices)
        titles, columns = (
            [f"input {lr.shape[-1]} px"],
            [F.interpolate(lr, truth.shape[-1], mode="nearest-exact")[:, None]],
        )
        for title, samples in shown.items():
            titles += [title, *(f"{title}, {number}" for number in range(2, samples.shape[1] + 1))]
            columns.append(from_uint8(samples).to(lr))
        images = torch.cat([*columns, from_uint8(truth)[:, None]], dim=1)
        return strip_sheet([*titles, "truth"], images.cpu(), smooth=False)
