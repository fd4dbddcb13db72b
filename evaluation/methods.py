"""The methods that are compared: each turns low-resolution faces into samples, and sees nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.operator import upscale_bicubic
from models.bundle import Bundle
from models.pretrained import tensors_sha256

if TYPE_CHECKING:
    from models.flow import FlowPrior


class Output(NamedTuple):
    """What a method makes of a batch; 1 ≤ c ≤ k samples, the point estimate first."""

    images: Tensor  # (B, c, 3, R, R), about [-1, 1], before any back-projection
    nfe: Tensor  # generator calls per sample (B, c): forward 1, backward 2


Method = Callable[[Tensor, int, int], Output]
"""Maps LR faces (B, 3, s, s) in [-1, 1], k and a seed to samples; seed and face determine the random numbers."""


def _fixed(images: Tensor) -> Output:
    """One sample (B, 3, R, R) that no generator had to synthesize."""
    return Output(images[:, None], torch.zeros(len(images), 1))


def make_bicubic(bundle: Bundle) -> Method:
    """Makes bicubic interpolation, the baseline; it has one sample whatever k."""
    return lambda lr, k, seed: _fixed(upscale_bicubic(lr, bundle.resolution))


def make_nearest(bundle: Bundle) -> Method:
    """Makes enlargement by repeated pixels, what the input looks like; one sample."""
    return lambda lr, k, seed: _fixed(F.interpolate(lr, size=bundle.resolution, mode="nearest-exact"))


def make_mean(bundle: Bundle) -> Method:
    """Makes the floor of a method that invents: the generator's face at the mean latent, the same for everybody."""
    generator = bundle.generator
    face = bundle.generate(generator.w_avg.expand(1, generator.num_ws, -1))  # (1, 3, R, R)
    return lambda lr, k, seed: _fixed(face.expand(len(lr), -1, -1, -1))


def make_amortized(bundle: Bundle) -> Method:
    """Makes a bundle's encoder and generator, without any search."""

    def run(lr: Tensor, k: int, seed: int) -> Output:
        images = bundle.generate(bundle.encode(lr, k, seed, bundle.encoder.noise_level(lr)))
        return Output(images, torch.ones(len(lr), k))

    return run


def make_search(bundle: Bundle, method: str, init: str, steps: int) -> Method:
    """Makes a latent search by its method, start and steps; those published with one answer give one sample."""
    from search.samples import SearchPlan, find_samples, synthesize  # late: only those who search wait for it

    def run(lr: Tensor, k: int, seed: int) -> Output:
        k = k if method in SEVERAL else 1
        sigma = bundle.encoder.noise_level(lr) if init == "encoder" else None  # published ones know nothing of noise
        result = find_samples(bundle, lr, k, SearchPlan(method, init, steps, seed=seed), sigma=sigma)
        return Output(*(part.unflatten(0, (len(lr), k)) for part in (synthesize(bundle, result), result.nfe)))

    return run


SEARCHES = {
    "pulse": ("random", 100),
    "mm-pulse": ("random", 100),
    "rls": ("mean", 500),
    "brgm": ("mean", 500),
    "wplus-adam": ("mean", 200),
}
"""Start and steps by name: as published, and Adam in W+ without any prior."""

SEVERAL = ("mm-pulse", "amortized")  # searches that give several samples; of the others there is one

DIRECT: dict[str, Callable[[Bundle], Method]] = {
    "bicubic": make_bicubic,
    "nearest": make_nearest,
    "mean": make_mean,
    "amortized": make_amortized,
}

METHODS = (*DIRECT, *SEARCHES, "amortized+search")
DEFAULT_METHODS = ("bicubic", "nearest", "mean", "amortized")


def recipe_hash(name: str, bundle: Bundle, search: int) -> str:
    """Hashes what a method's samples depend on, besides what it gets to see.

    That of bicubic interpolation is the same for every bundle; that of a search without the encoder changes with the
    generator, the statistics of its codes and, for RLS, the flow. A name outside of METHODS is that of a whole bundle.
    """
    text = bundle.hash
    if name in ("bicubic", "nearest"):
        text = name
    elif name == "mean":
        text = tensors_sha256(bundle.generator.state_dict())
    elif name in SEARCHES:
        latents = bundle.encoder.latents
        statistics = {
            key: getattr(latents, key) for key in ("w_avg", "mean", "factor", "sigma") if hasattr(latents, key)
        }
        text = tensors_sha256({**bundle.generator.state_dict(), **statistics}) + str(SEARCHES[name])
        if name == "rls":
            text += tensors_sha256(_flow_of(bundle).state_dict())
    elif name == "amortized+search":
        text += f" {search}"
    return hashlib.sha256(f"{name} {text}".encode()).hexdigest()


def _flow_of(bundle: Bundle) -> FlowPrior:
    from models.flow import flow_of  # late: it reads the flow, and says how to get one

    return flow_of(bundle)


def make_method(name: str, bundle: Bundle, search: int) -> Method:
    """Makes a method by its name, one of METHODS; `search` are the steps of "amortized+search".

    Raises:
        ValueError: If the bundle lacks what it needs: RLS needs a flow.
    """
    if name in DIRECT:
        return DIRECT[name](bundle)
    if name == "amortized+search":
        return make_search(bundle, "amortized", "encoder", search)
    if name == "rls":
        _flow_of(bundle)
    return make_search(bundle, name, *SEARCHES[name])
