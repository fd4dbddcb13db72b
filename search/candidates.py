"""k candidates for each face by a method and a start that go by their names, as `infer.py` offers them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.operator import EPSILON, Downscale
from search.curvature import Curvature, measure_curvature
from search.loop import Found, Step
from search.pulse import PRESETS, pulse, pulse_noise
from search.refine import RefineSettings, refine
from search.sphere import GaussianMap

if TYPE_CHECKING:
    from models.bundle import Bundle

METHODS = ("ours", "pulse")
STARTS = ("encoder", "random", "mean")
PERTURBATION = 0.1  # how far candidates 2 to k start from the mean, as a share of the way to a random face
CURVATURE_FACES = 96
PIXELS_AT_ONCE = 2**20  # of the faces in a batch; a search keeps their features for the gradient

_CURVATURES: dict[tuple[str, str, int], Curvature] = {}


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        method: One of `METHODS`.
        start: One of `STARTS`.
        steps: Steps of the search; 0 draws the starts as they are.
        epsilon: Tolerance of the downscaling error, mean squared in [0, 1]; searches end there.
        settings: Of "ours".
        seed: Of all random numbers.

    Raises:
        ValueError: If a name is unknown, a number is out of range, or PULSE is to start at the mean.
    """

    method: str = "ours"
    start: str = "encoder"
    steps: int = 0
    epsilon: float = EPSILON
    settings: RefineSettings = RefineSettings()
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the names and numbers."""
        for name, known in (("method", METHODS), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.steps < 0 or not 0 < self.epsilon < float("inf") or self.seed < 0:
            raise ValueError(
                f"Expected steps and seed from 0 and a positive epsilon, got {self.steps}, {self.seed}, {self.epsilon}."
            )
        if self.method == "pulse" and self.start == "mean":
            raise ValueError(
                "PULSE keeps every code at the length it starts with, and at the mean that is 0; start it from "
                "random or encoder."
            )


@torch.inference_mode(False)  # a search takes gradients, even where the caller wants none
def find_candidates(
    bundle: Bundle, lr: Tensor, k: int, plan: Plan, callback: Callable[[Step], None] | None = None
) -> Found:
    """Finds k candidates for each face.

    Args:
        bundle: Generator and encoder.
        lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
        k: Candidates per face. Candidate j is the same whatever k, and every face has the same random numbers.
        plan: What is asked for.
        callback: See `search.loop.search`.

    Returns:
        B · k rows, the candidates of the first face first.
    """
    lr = lr.to(bundle.device, torch.float32)
    target = lr.repeat_interleave(k, dim=0)  # (B · k, 3, s, s)
    operator, synthesis, latents = Downscale(lr.shape[-1]), bundle.generator.synthesis, bundle.encoder.latents
    at_once = _at_once(bundle)
    if plan.method == "ours":
        ws = start_codes(bundle, lr, k, plan)
        curvature = curvature_of(bundle, lr.shape[-1]) if plan.settings.space == "curvature" and plan.steps else None
        parts = synthesis, latents, operator, target, ws, plan.steps, plan.epsilon, plan.settings
        return refine(*parts, callback, at_once, curvature)
    to_w, rngs = GaussianMap.of(latents), _rngs(plan, k)
    if plan.start == "random":
        shape = (bundle.generator.num_ws, bundle.generator.w_dim)
        u = _normal(rngs, shape).to(bundle.device).repeat(len(lr), 1, 1)  # (B · k, L, D)
    else:
        u = to_w.from_w(start_codes(bundle, lr, k, plan))
    settings = replace(PRESETS["paper"], steps=plan.steps, epsilon=plan.epsilon)
    noise = [maps.repeat(len(lr), 1, 1, 1) for maps in pulse_noise(synthesis, rngs, settings.noise)]
    return pulse(synthesis, to_w, operator, target, u, noise, settings, callback, at_once)


def _normal(rngs: list[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
    """Draws standard normal numbers (k, …), each candidate's from its own source."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))


def _rngs(plan: Plan, k: int) -> list[np.random.Generator]:
    """Makes the source of each candidate's numbers."""
    return [np.random.default_rng((plan.seed, j)) for j in range(k)]


def start_codes(bundle: Bundle, lr: Tensor, k: int, plan: Plan) -> Tensor:
    """Gives the codes that a search starts from: the encoder's, random faces in W, or about the mean latent.

    Args:
        bundle: Generator and encoder.
        lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
        k: Candidates per face.
        plan: Names the start and the seed.

    Returns:
        Codes (B · k, L, D), the candidates of the first face first.
    """
    if plan.start == "encoder":  # one by one, so that every face has the same random numbers
        return torch.cat([bundle.encode(face[None], k, np.random.default_rng(plan.seed))[0] for face in lr])
    mean = bundle.encoder.latents.w_avg
    w = bundle.encoder.latents.sample(_normal(_rngs(plan, k), mean.shape).to(mean))  # (k, D), random faces
    if plan.start == "mean":
        w = torch.cat([mean[None], torch.lerp(mean.expand_as(w), w, PERTURBATION)[1:]])
    return w[:, None].expand(-1, bundle.generator.num_ws, -1).repeat(len(lr), 1, 1)


@torch.inference_mode(False)
def refine_codes(bundle: Bundle, lr: Tensor, ws: Tensor, steps: int, epsilon: float = EPSILON) -> Tensor:
    """Refines codes that are there already, such as the encoder's.

    Args:
        bundle: Generator and encoder.
        lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
        ws: Their codes (B, k, L, D).
        steps: See `search.refine.refine`.
        epsilon: Candidates within this downscaling error stay as they are.

    Returns:
        Codes (B, k, L, D).

    Raises:
        ValueError: If `steps` is negative.
    """
    if steps < 0:
        raise ValueError(f"Expected steps from 0, got {steps}.")
    target = lr.to(bundle.device, torch.float32).repeat_interleave(ws.shape[1], dim=0)  # (B · k, 3, s, s)
    parts = bundle.generator.synthesis, bundle.encoder.latents, Downscale(lr.shape[-1]), target
    found = refine(*parts, ws.flatten(0, 1), steps, epsilon, at_once=_at_once(bundle))
    return found.ws.view_as(ws)


def curvature_of(bundle: Bundle, lr_size: int) -> Curvature:
    """Measures the coordinates of the space "curvature" on faces that the generator draws; kept for later calls.

    Args:
        bundle: Generator and encoder.
        lr_size: Size of the LR pictures in px.

    Returns:
        P for that size.
    """
    key = bundle.hash, str(bundle.device), lr_size
    if key not in _CURVATURES:
        z = np.random.default_rng(0).standard_normal((CURVATURE_FACES, bundle.generator.z_dim), dtype=np.float32)
        operator = Downscale(lr_size)
        with torch.inference_mode():
            parts = torch.from_numpy(z).to(bundle.device).split(16)
            lr = torch.cat([operator(bundle.generator(part, truncation_psi=0.8).clamp(-1, 1)) for part in parts])
            ws = torch.cat([bundle.encode(part)[:, 0] for part in lr.split(16)])
        _CURVATURES[key] = measure_curvature(bundle.generator.synthesis, ws, operator)
    return _CURVATURES[key]


def _at_once(bundle: Bundle) -> int:
    return max(1, PIXELS_AT_ONCE // bundle.resolution**2)
