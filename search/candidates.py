"""k candidates for each face by a method and a start that go by their names, as `infer.py` offers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from data.sampling import check_sampling
from torch import Tensor

from data.operator import EPSILON, Downscale
from models.curvature import Curvature, measure_curvature
from search import rls
from search.loop import Found, Step
from search.plain import plain
from search.pulse import PRESETS, pulse, pulse_noise
from search.refine import RefineSettings, refine, spread_of_w
from search.sphere import GaussianMap

if TYPE_CHECKING:
    from losses.perceptual import LPIPS
    from models.bundle import Bundle

METHODS = ("ours", "pulse", "mm-pulse", "rls", "brgm", "plain")
PULSE_PRESETS = {"pulse": "paper", "mm-pulse": "mm-pulse"}  # by method
STARTS = ("encoder", "random", "mean")
PERTURBATION = 0.1  # how far candidates 2 to k start from the mean, as a share of the way to a random face
CURVATURE_FACES = 96
# Of the faces in a batch, whose features a search keeps for the gradient. A processor is half as fast again where they
# stay in its caches, a GPU wants to be filled.
PIXELS_AT_ONCE = {"cpu": 2**16, "cuda": 2**20, "mps": 2**20}

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
        passes: Of learned feedback, for the encoder's starts; None means the encoder's own choice.
        temperature: How far the encoder's candidates start from its best guess, see `models.bundle.Bundle.encode`.

    Raises:
        ValueError: If a name is unknown, a number is out of range, or PULSE is to start at the mean.
    """

    method: str = "ours"
    start: str = "encoder"
    steps: int = 0
    epsilon: float = EPSILON
    settings: RefineSettings = RefineSettings()
    seed: int = 0
    passes: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Checks the names and numbers."""
        for name, known in (("method", METHODS), ("start", STARTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.steps < 0 or not 0 < self.epsilon < float("inf") or self.seed < 0:
            raise ValueError(
                f"Expected steps and seed from 0 and a positive epsilon, got {self.steps}, {self.seed}, {self.epsilon}."
            )
        check_sampling(self.passes, self.temperature)
        if self.method in PULSE_PRESETS and self.start == "mean":
            raise ValueError(
                "PULSE keeps every code at the length it starts with, and at the mean that is 0; start it from "
                "random or encoder."
            )


@torch.inference_mode(False)  # a search takes gradients, even where the caller wants none
def find_candidates(
    bundle: Bundle,
    lr: Tensor,
    k: int,
    plan: Plan,
    callback: Callable[[Step], None] | None = None,
    seeds: Sequence[int] | None = None,
) -> Found:
    """Finds k candidates for each face.

    Args:
        bundle: Generator and encoder.
        lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
        k: Candidates per face. Candidate j is the same whatever k, and every face has the same random numbers.
        plan: What is asked for.
        callback: See `search.loop.search`.
        seeds: One per face, in place of the plan's, where faces are to have random numbers of their own.

    Returns:
        B · k rows, the candidates of the first face first.

    Raises:
        ValueError: If "rls" is asked for, and the bundle has no flow.
    """
    lr = lr.to(bundle.device, torch.float32)
    target = lr.repeat_interleave(k, dim=0)  # (B · k, 3, s, s)
    if plan.method in PULSE_PRESETS:
        return _pulse(bundle, lr, target, k, plan, callback, seeds)
    ws = start_codes(bundle, lr, k, plan, seeds)
    return _FROM_CODES[plan.method](bundle, target, ws, plan, callback)


Callback = Callable[[Step], None] | None


def _ours(bundle: Bundle, target: Tensor, ws: Tensor, plan: Plan, callback: Callback) -> Found:
    size = target.shape[-1]
    curvature = curvature_of(bundle, size) if plan.settings.space == "curvature" and plan.steps else None
    parts = bundle.search_synthesis, bundle.encoder.latents, Downscale(size), target, ws
    spent = _spent(bundle, plan.passes) if plan.start == "encoder" and plan.steps else 0
    at_once = rows_at_once(bundle)
    found = refine(*parts, plan.steps, plan.epsilon, plan.settings, callback, at_once, curvature, spent)
    return replace(found, passes=found.passes + spent)


def _rls(bundle: Bundle, target: Tensor, ws: Tensor, plan: Plan, callback: Callback) -> Found:
    from models.flow import flow_of  # late: it reads and makes the flow

    settings = replace(rls.PRESETS["paper"], steps=plan.steps, epsilon=plan.epsilon)
    parts = bundle.search_synthesis, flow_of(bundle), Downscale(target.shape[-1]), target, ws
    return rls.rls(*parts, settings, callback, rows_at_once(bundle))


def _brgm(bundle: Bundle, target: Tensor, ws: Tensor, plan: Plan, callback: Callback) -> Found:
    from search.brgm import brgm, cosine_weight  # late: it imports the trunk of LPIPS

    size, latents = target.shape[-1], bundle.encoder.latents
    weight, sigma = cosine_weight(bundle.resolution, size), spread_of_w(latents)
    place = bundle.search_synthesis, _lpips(str(bundle.device)), Downscale(size), latents.w_avg, sigma
    return brgm(*place, target, ws, weight, plan.steps, plan.epsilon, callback, rows_at_once(bundle))


def _plain(bundle: Bundle, target: Tensor, ws: Tensor, plan: Plan, callback: Callback) -> Found:
    sigma, operator = spread_of_w(bundle.encoder.latents), Downscale(target.shape[-1])
    parts = bundle.search_synthesis, sigma, operator, target, ws, plan.steps, plan.epsilon
    return plain(*parts, callback=callback, at_once=rows_at_once(bundle))


_FROM_CODES = {"ours": _ours, "rls": _rls, "brgm": _brgm, "plain": _plain}


def _pulse(
    bundle: Bundle,
    lr: Tensor,
    target: Tensor,
    k: int,
    plan: Plan,
    callback: Callback,
    seeds: Sequence[int] | None,
) -> Found:
    synthesis, to_w = bundle.search_synthesis, GaussianMap.of(bundle.encoder.latents)
    rngs = _rngs(plan, k, len(lr), seeds)
    if plan.start == "random":
        u = _normal(rngs, (bundle.generator.num_ws, bundle.generator.w_dim)).to(bundle.device)  # (B · k, L, D)
    else:
        u = to_w.from_w(start_codes(bundle, lr, k, plan, seeds))
    settings = replace(PRESETS[PULSE_PRESETS[plan.method]], steps=plan.steps, epsilon=plan.epsilon)
    noise = pulse_noise(synthesis, rngs, settings.noise)
    operator = Downscale(lr.shape[-1])
    return pulse(synthesis, to_w, operator, target, u, noise, settings, callback, rows_at_once(bundle))


@lru_cache(maxsize=2)
def _lpips(device: str) -> LPIPS:
    """Loads LPIPS once."""
    from losses.perceptual import LPIPS

    return LPIPS().to(device)


def _normal(rngs: list[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
    """Draws standard normal numbers (N, …), each row's from its own source."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))


def _rngs(plan: Plan, k: int, faces: int, seeds: Sequence[int] | None = None) -> list[np.random.Generator]:
    """Makes the source of each row's numbers, the candidates of the first face first."""
    return [np.random.default_rng((seed, j)) for seed in _seeds(plan, faces, seeds) for j in range(k)]


def _seeds(plan: Plan, faces: int, seeds: Sequence[int] | None) -> Sequence[int]:
    return [plan.seed] * faces if seeds is None else seeds


def start_codes(bundle: Bundle, lr: Tensor, k: int, plan: Plan, seeds: Sequence[int] | None = None) -> Tensor:
    """Gives the codes that a search starts from: the encoder's, random faces in W, or about the mean latent.

    Args:
        bundle: Generator and encoder.
        lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
        k: Candidates per face.
        plan: Names the start and the seed.
        seeds: See `find_candidates`.

    Returns:
        Codes (B · k, L, D), the candidates of the first face first.
    """
    if plan.start == "encoder":  # one by one, so that a face comes out the same alone and in company
        sources = [np.random.default_rng(seed) for seed in _seeds(plan, len(lr), seeds)]
        how = plan.passes, plan.temperature
        return torch.cat([bundle.encode(face[None], k, rng, *how)[0] for face, rng in zip(lr, sources, strict=True)])
    mean = bundle.encoder.latents.w_avg
    noise = _normal(_rngs(plan, k, len(lr), seeds), mean.shape).to(mean)
    w = torch.cat([bundle.encoder.latents.sample(part) for part in noise.split(k)])  # (B · k, D), random faces
    if plan.start == "mean":
        share = rls.PERTURBATION if plan.method == "rls" else PERTURBATION
        w = torch.lerp(mean.expand_as(w), w, share)
        w[::k] = mean
    return w[:, None].repeat(1, bundle.generator.num_ws, 1)


@torch.inference_mode(False)
def refine_codes(
    bundle: Bundle, lr: Tensor, ws: Tensor, steps: int, epsilon: float = EPSILON, passes: int | None = None
) -> Tensor:
    """Refines codes that are there already, such as the encoder's.

    Args:
        bundle: Generator and encoder.
        lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
        ws: Their codes (B, k, L, D).
        steps: See `search.refine.refine`.
        epsilon: Candidates within this downscaling error stay as they are.
        passes: Of learned feedback that the codes have cost, which count; None means the encoder's own choice.

    Returns:
        Codes (B, k, L, D).

    Raises:
        ValueError: If `steps` is negative.
    """
    if steps < 0:
        raise ValueError(f"Expected steps from 0, got {steps}.")
    target = lr.to(bundle.device, torch.float32).repeat_interleave(ws.shape[1], dim=0)  # (B · k, 3, s, s)
    parts = bundle.search_synthesis, bundle.encoder.latents, Downscale(lr.shape[-1]), target
    curvature = curvature_of(bundle, lr.shape[-1]) if steps else None
    at_once, spent = rows_at_once(bundle), _spent(bundle, passes)
    found = refine(*parts, ws.flatten(0, 1), steps, epsilon, at_once=at_once, curvature=curvature, spent=spent)
    return found.ws.view_as(ws)


def _spent(bundle: Bundle, passes: int | None) -> int:
    """Generator passes that the encoder's codes have cost: a drawing of the first ones, and of each correction."""
    taken = bundle.encoder.passes(passes)
    return taken + 1 if taken else 0


def curvature_of(bundle: Bundle, lr_size: int) -> Curvature:
    """Gives the coordinates of the space "curvature": the bundle's own, or measured on faces that the generator draws.

    Args:
        bundle: Generator and encoder.
        lr_size: Size of the LR pictures in px.

    Returns:
        P, measured for that size unless the bundle has it.
    """
    stored = bundle.encoder.latents.curvature
    if stored is not None:
        return stored
    key = bundle.hash, str(bundle.device), lr_size
    if key not in _CURVATURES:
        z = np.random.default_rng(0).standard_normal((CURVATURE_FACES, bundle.generator.z_dim), dtype=np.float32)
        operator = Downscale(lr_size)
        with torch.inference_mode():
            parts = torch.from_numpy(z).to(bundle.device).split(16)
            lr = torch.cat([operator(bundle.generator(part, truncation_psi=0.8).clamp(-1, 1)) for part in parts])
            ws = torch.cat([bundle.encode(part)[:, 0] for part in lr.split(16)])
        _CURVATURES[key] = measure_curvature(bundle.generator.synthesis, ws, [operator])
    return _CURVATURES[key]


def rows_at_once(bundle: Bundle) -> int:
    """Says how many rows are searched together; further ones wait, or are searched beside them."""
    device = bundle.device.type
    # In bfloat16 twice as many fit into a processor's caches.
    pixels = PIXELS_AT_ONCE[device] * (2 if device == "cpu" and bundle.precision == "bf16" else 1)
    return max(1, pixels // bundle.resolution**2)
