"""PULSE (Menon et al. 2020) as published: projected gradient descent on the sphere of the Gaussianised W+.

    100 · max(‖D(g(w)) − y‖², ε) + 0.05 · GEOCROSS(w),    w = lrelu₀.₂(σ u + μ)

with the mean square in units of [0, 1], u (L, D) on the spheres of its start, Adam at 0.4 times a cycle that ends in a
drop, and noise maps: the first ones trained, each on its own sphere, the last one zero.

Unlike the published code, a search ends once it is within ε, and the evaluation with the smallest residual is kept; the
code continues with the geodesic term alone, and returns its last face.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.generator import SynthesisNetwork
from search.loop import Codes, Problem, Rows, Search
from search.optimizers import Adam
from search.sphere import GaussianMap, OnSphere, geodesic_cross

NOISE_KINDS = ("zero", "fixed", "trainable")


@dataclass(frozen=True)
class PulseSettings:
    """The settings of PULSE; the defaults are the published code's, whose ε is 2e-3 where the paper has 1e-3."""

    epsilon: float = 2e-3  # tolerance ε of the residual
    steps: int = 100  # that the schedule is for
    learning_rate: float = 0.4  # peak of the schedule
    l2: float = 100.0  # weight of the residual
    geocross: float = 0.05  # weight of the geodesic cross loss
    noise: str = "trainable"  # "zero", "fixed" (random) or "trainable" (the first maps are searched)
    trainable_maps: int = 5  # how many

    def __post_init__(self) -> None:
        """Checks the name."""
        if self.noise not in NOISE_KINDS:
            raise ValueError(f"Expected noise to be one of {', '.join(NOISE_KINDS)}, got {self.noise!r}.")


# MM-PULSE (Hıdıroğlu, Turan, Yılmaz) is PULSE from k random codes, with noise that is not searched; its code samples
# the noise anew at every step, here it is sampled once, so that the face that was found can be synthesized again.
SETTINGS = {"pulse": PulseSettings(), "mm-pulse": PulseSettings(noise="fixed")}


def cycle_with_drop(number: float, steps: int) -> float:
    """The factor of the learning rate: from 0.1 up to 1 and back in 90 % of the steps, then down to 0.001.

    "linear1cycledrop" in the published code.
    """
    cycle = 0.9 * steps
    if number < cycle:
        return 0.1 + 0.9 * (1 - abs(2 * number / cycle - 1))
    return 0.1 + (number - cycle) / (0.1 * steps) * (0.001 - 0.1)


def pulse_noise(synthesis: SynthesisNetwork, rngs: list[np.random.Generator], kind: str) -> list[Tensor]:
    """Samples a noise map (N, 1, H, W) per layer of a kind of `PulseSettings.noise`; the last is always zero."""
    device = synthesis.layers[0].noise_const.device
    maps = []
    for i, layer in enumerate(synthesis.layers):
        shape = (1, layer.resolution, layer.resolution)
        if kind == "zero" or i == synthesis.num_layers - 1:
            maps.append(torch.zeros(len(rngs), *shape, device=device))
        else:
            sampled = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])
            maps.append(torch.from_numpy(sampled).to(device))
    return maps


def pulse(
    synthesis: SynthesisNetwork,
    to_w: GaussianMap,
    operator: Callable[[Tensor], Tensor],
    u: Tensor,
    noise: list[Tensor],
    settings: PulseSettings = SETTINGS["pulse"],
) -> Search:
    """States PULSE.

    Args:
        synthesis: The network.
        to_w: The Gaussianised W.
        operator: The downscaling D.
        u: Where to start (N, L, D); standard normal in the paper. Every style stays at its own length.
        noise: Maps (N, 1, H, W) per layer, see `pulse_noise`.
        settings: Weights, schedule and ε.

    Returns:
        The search; its variables are "u" and the searched maps "noise 0" …, the other maps are constants.
    """

    def decode(variables: Rows, constants: Rows) -> Codes:
        maps = variables | constants
        return Codes(to_w.to_w(variables["u"]), [maps[f"noise {i}"] for i in range(len(noise))])

    def loss(variables: Rows, codes: Codes, residuals: Tensor) -> Tensor:
        error = residuals.square().sum(dim=1).clamp(min=settings.epsilon)
        return settings.l2 * error + settings.geocross * geodesic_cross(codes.ws)

    searched = min(settings.trainable_maps, len(noise) - 1) if settings.noise == "trainable" else 0
    maps = {f"noise {i}": tensor for i, tensor in enumerate(noise)}
    variables = {"u": u} | {name: maps.pop(name) for name in list(maps)[:searched]}
    rate, steps = settings.learning_rate, settings.steps
    optimizer = OnSphere(Adam(lambda number: rate * cycle_with_drop(number, steps)))
    return Search(Problem(decode, synthesis, operator, loss=loss), variables, maps, optimizer)
