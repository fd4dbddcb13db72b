"""k samples for each face by a search, whose method and start go by their names, as `infer.py` offers them.

Only `amortized` with `--init encoder` uses the whole encoding: the published methods search codes alone, and start from
the encoding's codes without its details.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.operator import Downscale
from models.device import faces_at_once
from models.encoder_base import face_keys
from search.amortized import amortized
from search.loop import Callback, Search, SearchResult
from search.plan import SearchPlan
from search.pulse import SETTINGS, pulse, pulse_noise
from search.rls import PERTURBATION, RlsSettings, rls
from search.sphere import GaussianMap
from search.wplus_adam import wplus_adam

if TYPE_CHECKING:
    from models.bundle import Bundle

MEAN_PERTURBATION = 0.1  # how far samples 2 to k start from the mean, as a share of the way to a random face
# Of the faces in a batch, whose features a search keeps for the gradient. A processor is half as fast again where they
# stay in its caches, a GPU wants to be filled.
PIXELS = {"cpu": 2**16, "cuda": 2**20, "mps": 2**20}


@torch.inference_mode(False)  # a search takes gradients, even where the caller wants none
def find_samples(
    bundle: Bundle,
    lr: Tensor,
    k: int,
    plan: SearchPlan,
    callback: Callback | None = None,
    sigma: Tensor | None = None,
) -> SearchResult:
    """Searches for k samples of each face.

    Args:
        bundle: Generator and encoder.
        lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
        k: Samples per face. Sample j is the same whatever k and the batch are.
        plan: What is asked for.
        callback: See `search.loop.Search.run`.
        sigma: Standard deviation of the noise in the faces, in grey levels (B,); 0 if None.

    Returns:
        N = B · k results, the samples of the first face first; `synthesize` makes faces of them.

    Raises:
        ValueError: If "rls" is asked for, and the bundle has no flow.
    """
    lr = lr.to(bundle.device, torch.float32)
    target = lr.repeat_interleave(k, dim=0)  # (B · k, 3, s, s)
    search, details = _start(bundle, lr, k, plan, sigma)
    epsilon = torch.full((len(lr),), plan.tolerance)
    if sigma is not None:
        epsilon = torch.maximum(epsilon, (sigma.cpu().float() / 255).square())
    epsilon = epsilon.repeat_interleave(k).to(bundle.device)
    result = search.run(target, plan.steps, epsilon, callback, batch_size(bundle))
    return replace(result, details=details)


@torch.inference_mode()
def synthesize(bundle: Bundle, result: SearchResult, offset: Tensor | None = None) -> Tensor:
    """Synthesizes the N faces that were found, before back-projection: (N, 3, R, R), about [-1, 1] but not clamped.

    `offset` (L, D) is added to their codes, such as an edit.

    Raises:
        ValueError: If they are not finite: the search has diverged, or the network's weights are broken.
    """
    if offset is not None:
        result = replace(result, ws=result.ws + offset.to(result.ws))
    synthesis = bundle.generator.synthesis
    images = torch.cat(
        [synthesis(p.ws, noise=p.noise, details=p.details) for p in result.split(faces_at_once(bundle.generator))]
    )
    if not images.isfinite().all():
        raise ValueError("Expected finite faces from the search, got NaN or infinite values; take fewer steps.")
    return images


def batch_size(bundle: Bundle) -> int:
    """Says how many searches run together; further ones wait, or run in other threads."""
    device = bundle.device.type
    # In bfloat16 twice as many fit into a processor's caches.
    pixels = PIXELS[device] * (2 if device == "cpu" and bundle.precision == "bf16" else 1)
    return max(1, pixels // bundle.resolution**2)


def _start(
    bundle: Bundle, lr: Tensor, k: int, plan: SearchPlan, sigma: Tensor | None
) -> tuple[Search, dict[int, Tensor]]:
    """Puts a method at its start; gives the details that it holds fixed as well."""
    latents, operator = bundle.encoder.latents, Downscale(lr.shape[-1])
    synthesis, w_std = bundle.search_synthesis, float(latents.sigma)
    rngs = [np.random.default_rng((plan.seed, key, j)) for key in face_keys(lr) for j in range(k)]
    if plan.method in SETTINGS:
        to_w = GaussianMap.of(latents)
        if plan.init == "random":
            u = _normal(rngs, (bundle.generator.num_ws, bundle.generator.w_dim)).to(bundle.device)  # (N, L, D)
        else:
            u = to_w.from_w(_start_codes(bundle, lr, k, plan, sigma, rngs)[0])
        settings = replace(SETTINGS[plan.method], steps=plan.steps, epsilon=plan.tolerance)
        return pulse(synthesis, to_w, operator, u, pulse_noise(synthesis, rngs, settings.noise), settings), {}
    ws, details = _start_codes(bundle, lr, k, plan, sigma, rngs)
    if plan.method == "amortized":
        return amortized(synthesis, w_std, latents.preconditioner, operator, ws, details), details
    if plan.method == "rls":
        from models.flow import flow_of  # late: it reads and makes the flow

        return rls(synthesis, flow_of(bundle), operator, ws, RlsSettings(steps=plan.steps)), {}
    if plan.method == "brgm":
        from losses.perceptual import LPIPS
        from search.brgm import brgm, cosine_weight

        weight = cosine_weight(bundle.resolution, lr.shape[-1])
        return brgm(synthesis, LPIPS().to(bundle.device), operator, latents.w_avg, w_std, ws, weight), {}
    return wplus_adam(synthesis, w_std, operator, ws), {}


def _start_codes(
    bundle: Bundle, lr: Tensor, k: int, plan: SearchPlan, sigma: Tensor | None, rngs: list[np.random.Generator]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Codes (N, L, D): the encoder's, with its details (N, C, r, r), random faces, or about the mean latent."""
    if plan.init == "encoder":
        encoding = bundle.encode(lr, k, plan.seed, sigma)
        return encoding.ws.flatten(0, 1), {size: d.flatten(0, 1) for size, d in encoding.details.items()}
    latents = bundle.encoder.latents
    w = latents.sample(_normal(rngs, latents.w_avg.shape).to(latents.w_avg))  # (N, D), random faces
    if plan.init == "mean":
        share = PERTURBATION if plan.method == "rls" else MEAN_PERTURBATION
        w = torch.lerp(latents.w_avg.expand_as(w), w, share)
        w[::k] = latents.w_avg
    return w[:, None].repeat(1, bundle.generator.num_ws, 1), {}


def _normal(rngs: list[np.random.Generator], shape: tuple[int, ...]) -> Tensor:
    """Samples standard normal numbers (N, …), each row from its own source."""
    return torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))
