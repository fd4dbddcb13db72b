"""The methods that are compared: each turns low-resolution faces into samples, and sees nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.operator import upscale_bicubic
from models.bundle import Bundle
from models.pretrained import tensors_sha256
from search.candidates import Plan, find_candidates
from search.loop import draw

if TYPE_CHECKING:
    from models.flow import FlowPrior


class Output(NamedTuple):
    """What a method makes of a batch.

    Attributes:
        images: Samples (B, c, 3, R, R), about [-1, 1], before any back-projection, 1 ≤ c ≤ k; the first is the point
            estimate.
        nfe: Generator calls per sample (B, c): forward 1, backward 2, forward-mode derivative 2.
    """

    images: Tensor
    nfe: Tensor


Method = Callable[[Tensor, int, Sequence[int]], Output]
"""Maps LR faces (B, 3, s, s) in [-1, 1], k, and a seed per face to samples."""


def _fixed(images: Tensor) -> Output:
    """One sample (B, 3, R, R) that no generator had to synthesize."""
    return Output(images[:, None], torch.zeros(len(images), 1))


def make_bicubic(bundle: Bundle) -> Method:
    """Makes bicubic interpolation, the baseline; it has one sample whatever k."""
    return lambda lr, k, seeds: _fixed(upscale_bicubic(lr, bundle.resolution))


def make_nearest(bundle: Bundle) -> Method:
    """Makes enlargement by repeated pixels, what the input looks like; one sample."""
    return lambda lr, k, seeds: _fixed(F.interpolate(lr, size=bundle.resolution, mode="nearest-exact"))


def make_mean(bundle: Bundle) -> Method:
    """Makes the floor of a method that invents: the generator's face at the mean latent, the same for everybody."""
    generator = bundle.generator
    face = bundle.generate(generator.w_avg.expand(1, generator.num_ws, -1))  # (1, 3, R, R)
    return lambda lr, k, seeds: _fixed(face.expand(len(lr), -1, -1, -1))


def make_amortized(bundle: Bundle, refine_iters: int | None = None) -> Method:
    """Makes a bundle's encoder and generator, without any search; refine_iters None means the encoder's own choice."""
    taken = bundle.encoder.passes(refine_iters)

    def run(lr: Tensor, k: int, seeds: Sequence[int]) -> Output:
        # One by one, so that a face comes out the same alone and in company.
        sources = [np.random.default_rng(seed) for seed in seeds]
        images = [
            bundle.upsample(face[None], k, rng=rng, passes=refine_iters)[0]
            for face, rng in zip(lr, sources, strict=True)
        ]
        return Output(torch.cat(images), torch.full((len(lr), k), 1.0 + taken))

    return run


def make_search(bundle: Bundle, plan: Plan, most: int | None = None) -> Method:
    """Makes a latent search.

    Args:
        bundle: What it searches in.
        plan: The search; its seed is replaced by the faces' own.
        most: Samples at most, for methods that have one answer.

    Returns:
        The method.
    """

    def run(lr: Tensor, k: int, seeds: Sequence[int]) -> Output:
        c = k if most is None else min(k, most)
        found = find_candidates(bundle, lr, c, plan, seeds=seeds)
        images = torch.cat([draw(bundle.generator.synthesis, part) for part in found.split(64)])
        return Output(images.unflatten(0, (len(lr), c)), found.passes.float().cpu().unflatten(0, (len(lr), c)))

    return run


SEARCHES = {
    "pulse": Plan("pulse", "random", 100),
    "mm-pulse": Plan("mm-pulse", "random", 100),
    "rls": Plan("rls", "mean", 500),
    "brgm": Plan("brgm", "mean", 500),
    "wplus-adam": Plan("plain", "mean", 200),
}
"""As published, by name; PULSE with the paper's ε, and 200 steps of Adam in W+ without any prior."""

SEVERAL = ("mm-pulse",)  # searches that are published as giving several samples; of the others there is one

DIRECT: dict[str, Callable[[Bundle], Method]] = {
    "bicubic": make_bicubic,
    "nearest": make_nearest,
    "mean": make_mean,
    "amortized": make_amortized,
    "amortized-no-refine": lambda bundle: make_amortized(bundle, 0),
}

METHODS = (*DIRECT, *SEARCHES, "amortized+search")
DEFAULT_METHODS = ("bicubic", "nearest", "mean", "amortized")


def recipe_hash(name: str, bundle: Bundle, search: int) -> str:
    """Tells by a hash what a method's samples depend on, besides what it gets to see.

    Args:
        name: One of METHODS; any other name is that of a whole bundle's encoder.
        bundle: What the method is made of.
        search: Steps of the method "amortized+search".

    Returns:
        A hash: for bicubic interpolation the same whatever the bundle, and for the searches that know no encoder as
        long as generator, statistics of its latents and, for RLS, the flow stay the same.
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
    """Makes a method by its name.

    Args:
        name: One of METHODS.
        bundle: What it is made of.
        search: Steps of the method "amortized+search".

    Returns:
        The method.

    Raises:
        ValueError: If the bundle lacks what it needs: RLS needs a flow.
    """
    if name in DIRECT:
        return DIRECT[name](bundle)
    if name == "amortized+search":
        return make_search(bundle, Plan("ours", "encoder", search))
    if name == "rls":
        _flow_of(bundle)
    return make_search(bundle, SEARCHES[name], most=None if name in SEVERAL else 1)
