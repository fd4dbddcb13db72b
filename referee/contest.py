"""The contest: every method in every setting, on the same faces, batch by batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.degradation import DEGRADATIONS, Degradation, face_rngs
from data.faces import Faces
from data.operator import EPSILON, Downscale
from data.reading import from_uint8, to_uint8
from referee import cells
from referee.cells import Processes, Store, read_faces
from referee.figure import figure
from referee.frechet import Moments, frechet_distance
from referee.judge import Referee, Values, means_of
from referee.measures import as_written
from referee.methods import Method

FRECHET_FACES = 1000  # below, the covariance of the features is too uncertain
TIMED_FACES, WARM_UP = 20, 3
SLOW = 1.0  # seconds; a method that takes longer needs no more warming up
TIMED_SECONDS = 20.0  # a slow method is timed on fewer faces
SHOWN_FACES = 6
TRUTH = "truth"


@dataclass(frozen=True)
class Setting:
    """What the methods get to see.

    Attributes:
        size: LR size in pixels.
        degradation: What happens besides downscaling.
    """

    size: int
    degradation: Degradation = DEGRADATIONS["clean"]

    @property
    def name(self) -> str:
        """Its key in results and file names: "16", or "16_noise25"."""
        return f"{self.size}" if self.degradation.name == "clean" else f"{self.size}_{self.degradation.name}"

    @property
    def title(self) -> str:
        """Its name in tables: "16 px", or "16 px, noise25"."""
        return f"{self.size} px" if self.degradation.name == "clean" else f"{self.size} px, {self.degradation.name}"

    def pictures(self, truth: Tensor, seed: int, places: list[int]) -> tuple[Tensor, Tensor]:
        """Makes LR pictures of faces.

        Args:
            truth: Faces (B, 3, R, R), uint8.
            seed: Of the degradations.
            places: Of the faces in the data set, so that a face meets the same noise in whatever batch it comes.

        Returns:
            What the methods see, and the same without degradation, (B, 3, s, s) in [-1, 1] with 8-bit values.
        """
        faces, operator = from_uint8(truth), Downscale(self.size)
        clean = from_uint8(to_uint8(operator(faces)))
        return self.degradation(faces, operator, face_rngs(seed, places)), clean


@dataclass
class Outcome:
    """What one method did in one setting.

    Attributes:
        means: Mean over faces by the name of the measure; None where it does not apply or cannot be measured.
        shown: Pictures (n, 1 or 2, 3, R, R), uint8: best guess and second candidate of the first faces.
        seconds: Median time for one face, one candidate, batch 1.
        faces: Per face: `rows` (N,), and `error`, `error_clean` (N, c), `lpips` (N,), for groups.
    """

    means: dict[str, Any]
    shown: Tensor
    seconds: float
    faces: dict[str, Tensor] = field(repr=False, default_factory=dict)


class Contest:
    """Lets methods run, and collects what the referee says.

    Args:
        faces: The truths.
        referee: Measures.
        store: Keeps what was measured.
        processes: Those that share the work.
        k: Candidates per face to ask for.
        seed: Of the candidates and degradations.
        made_of: What a method's pictures depend on, by its name, see `referee.methods.made_of`.
    """

    def __init__(
        self,
        faces: Faces,
        referee: Referee,
        store: Store,
        processes: Processes,
        k: int,
        seed: int,
        made_of: Mapping[str, str],
    ) -> None:
        self.faces, self.referee, self.store, self.processes = faces, referee, store, processes
        self.k, self.seed, self.made_of = k, seed, made_of
        self.problems: list[str] = []

    def _cell(self, name: str, setting: Setting) -> str:
        """Names the cell of a method in a setting."""
        return f"{setting.name}-{name}-{self.made_of[name][:16]}"

    def run(self, name: str, method: Method, setting: Setting, progress: tqdm | None = None) -> None:
        """Lets one method run on this process's share of the faces, but for what was done before.

        Args:
            name: Of the method.
            method: The method.
            setting: What it sees.
            progress: A bar to move on by the number of faces.

        Raises:
            ValueError: If the method returns pictures of another shape, or not finite.
        """
        for part in self.processes.mine(len(self.faces), cells.BATCH):
            self._look_at_truth(part)
            cell = self._cell(name, setting)
            if not self.store.has(cell, part):
                truth, places, problems = read_faces(self.faces, part, self.referee.device)
                values = self._judge(method, setting, truth, places) if places else {}
                self.store.write(cell, part, values | {cells.ROWS: torch.tensor(places)}, problems)
            if progress is not None:
                progress.update(part.stop - part.start)

    def _look_at_truth(self, part: slice) -> None:
        """Keeps what belongs to the true faces, once for all methods and settings."""
        if not self.store.has(TRUTH, part):
            truth, places, problems = read_faces(self.faces, part, self.referee.device)
            values = self.referee.look_at_truth(truth) if places else {}
            self.store.write(TRUTH, part, values | {cells.ROWS: torch.tensor(places)}, problems)

    def _judge(self, method: Method, setting: Setting, truth: Tensor, places: list[int]) -> Values:
        """Lets the method draw a batch of faces (B, 3, R, R), uint8, and measures what it drew."""
        lr, clean = setting.pictures(truth, self.seed, places)
        drawn = method(lr, self.k, [self._face_seed(setting, place) for place in places])
        pictures = as_written(drawn.images, len(truth), self.faces.resolution)  # (B, c, 3, R, R)
        values = self.referee.measure(pictures, truth, lr, clean)
        values["passes"] = drawn.passes.float().cpu()
        shown = [i for i, place in enumerate(places) if place < SHOWN_FACES]
        values["shown"] = pictures[shown][:, :2].cpu()
        return values

    def _face_seed(self, setting: Setting, place: int) -> int:
        """The seed of a face's candidates, which depends on nothing but the run's seed, the LR size and the face."""
        return int(np.random.SeedSequence((self.seed, setting.size, place)).generate_state(1)[0])

    # ---------------------------------------------------------------- afterwards

    def outcome(self, name: str, method: Method, setting: Setting) -> Outcome:
        """Puts together what all processes measured.

        Args:
            name: Of the method.
            method: The method, whose time is taken unless it was before.
            setting: What it saw.

        Returns:
            Means, pictures and time.

        Raises:
            ValueError: If no face could be read.
        """
        parts: dict[str, list[Tensor]] = {}
        moments: list[Moments] = []
        problems: list[str] = []
        for values, failed in self.store.batches(self._cell(name, setting), len(self.faces), cells.BATCH):
            problems += failed
            if "features" in values:
                _collect(moments, values.pop("features"))
            for measure, value in values.items():
                parts.setdefault(measure, []).append(value)
        self.problems = problems
        if "error" not in parts:
            raise ValueError(f"Expected faces in {self.faces.source}, none of them can be read: {problems[0]}")
        values = {measure: torch.cat(value) for measure, value in parts.items()}
        rows, shown, attributes = values.pop(cells.ROWS), values.pop("shown"), values.pop("attributes", None)
        means: dict[str, Any] = dict(means_of(values, EPSILON))
        truth, truth_attributes = self._truth()
        if moments and truth is not None:
            means["frechet"] = frechet_distance(moments[0], truth)
            means["frechet_sample"] = frechet_distance(moments[-1], truth)
        if attributes is not None and truth_attributes is not None and self.referee.attributes is not None:
            means["attributes"] = attribute_rates(attributes, truth_attributes, self.referee.attributes.names)
        seconds = self._seconds(name, method, setting)
        kept = {name: values[name] for name in ("error", "error_clean", "lpips")} | {cells.ROWS: rows}
        return Outcome(means, shown, seconds, kept)

    def _truth(self) -> tuple[Moments | None, Tensor | None]:
        """Moments of the true faces' features, and their attributes (N, A)."""
        moments: list[Moments] = []
        attributes: list[Tensor] = []
        for values, _ in self.store.batches(TRUTH, len(self.faces), cells.BATCH):
            if "features" in values:
                _collect(moments, values["features"][:, None])
            if "attributes" in values:
                attributes.append(values["attributes"])
        return (moments[0] if moments else None), (torch.cat(attributes) if attributes else None)

    def _seconds(self, name: str, method: Method, setting: Setting) -> float:
        """Gives the time for one face, as it was taken before, or takes it."""
        key = f"seconds-{self._cell(name, setting)}"
        kept = self.store.note(key)
        return float(kept if kept is not None else self.store.note(key, self.seconds(method, setting)) or 0.0)

    @torch.no_grad()
    def seconds(self, method: Method, setting: Setting) -> float:
        """Takes the median time in seconds for one face, one candidate, batch 1, after warming up."""
        unreadable = self._unreadable()
        places = [i for i in range(min(len(self.faces), 10 * TIMED_FACES)) if i not in unreadable][:TIMED_FACES]
        for _ in range(WARM_UP):
            if self._time(method, setting, places[0]) > SLOW:
                break
        times: list[float] = []
        for place in places:
            times.append(self._time(method, setting, place))
            if sum(times) > TIMED_SECONDS:
                break
        return statistics.median(times)

    def _time(self, method: Method, setting: Setting, place: int) -> float:
        """Times one candidate of one face, in seconds."""
        truth, places, _ = read_faces(self.faces, slice(place, place + 1), self.referee.device)
        lr, _ = setting.pictures(truth, self.seed, places)
        self._synchronize()
        start = time.perf_counter()
        method(lr, 1, [0])
        self._synchronize()
        return time.perf_counter() - start

    def _unreadable(self) -> set[int]:
        found = set(range(len(self.faces)))
        for values, _ in self.store.batches(TRUTH, len(self.faces), cells.BATCH):
            found -= set(values[cells.ROWS].tolist())
        return found

    def _synchronize(self) -> None:
        if self.referee.device.type == "cuda":
            torch.cuda.synchronize(self.referee.device)
        elif self.referee.device.type == "mps":
            torch.mps.synchronize()

    def figure(self, setting: Setting, shown: Mapping[str, Tensor]) -> Image.Image:
        """Draws the first faces.

        Args:
            setting: What was seen.
            shown: By title, pictures of `Outcome.shown`.

        Returns:
            The picture.
        """
        part = slice(0, min(SHOWN_FACES, len(self.faces)))
        truth, places, _ = read_faces(self.faces, part, self.referee.device)
        lr, _ = setting.pictures(truth, self.seed, places)
        return figure(truth.cpu(), to_uint8(lr).cpu(), shown)


def _collect(moments: list[Moments], features: Tensor) -> None:
    """Adds features (B, c, F) to one set of moments per candidate."""
    while len(moments) < features.shape[1]:
        moments.append(Moments(features.shape[2]))
    for own, part in zip(moments, features.unbind(dim=1), strict=True):
        own.add(part)


def attribute_rates(seen: Tensor, truth: Tensor, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Compares how often a classifier finds the attributes in results and in truth.

    Args:
        seen: In all candidates (N, c, A), the best guess first.
        truth: In the true faces (N, A).
        names: Of the attributes.

    Returns:
        By name: `rate` among all candidates, `truth`, and `agreement`, the share of faces whose best guess has what the
        truth has.
    """
    rates, true_rates = seen.double().mean(dim=(0, 1)), truth.double().mean(dim=0)
    agreement = (seen[:, 0] == truth).double().mean(dim=0)
    columns = zip(names, rates.tolist(), true_rates.tolist(), agreement.tolist(), strict=True)
    return {name: {"rate": rate, "truth": true, "agreement": agree} for name, rate, true, agree in columns}
