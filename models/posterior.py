"""Distributions over w given an LR face: what the encoder knows, and what it does not know.

All of them speak of u, the code w in whitened coordinates (`models.latents`): lrelu₅(w) = μ + F u, in which the
generator's own codes are nearly standard normal. They see features of the encoder, called the context, and are fitted
to pairs that the generator makes: z → w → face → LR face. The true w of such a pair is known, so that its likelihood
can be maximised without any photo and without a gradient through the generator.

    GaussianPosterior   u = A t,  t ~ N(m(c), r² (diag s(c)² + V(c) V(c)ᵀ)), with one learned A for all faces, and a
                        width r that is itself random, log r ~ N(log r₀, τ²): codes differ in length by more than a
                        Gaussian allows
    FlowPosterior       u = A t,  t a conditional flow of affine couplings (zuko) on top of a Gaussian
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal

KINDS = ("gaussian", "flow")
NODES = 12  # of the quadrature over r
LOG_SCALE_FLOOR = -4.0  # true codes lie on no thinner sheet than that: a density that follows them for ever is no help


class ContextNetwork(nn.Module):
    """Reads the context.

    Args:
        context_dim: Width of the context.
        out: Width of the result.
        hidden: Width between.
        rank: Width of a bottleneck in the first layer, see `models.compression`; 0 for none.
    """

    def __init__(self, context_dim: int, out: int, hidden: int = 256, rank: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(context_dim, elementwise_affine=False)
        bottleneck = nn.Sequential(nn.Linear(context_dim, rank, bias=False), nn.Linear(rank, hidden)) if rank else None
        self.first = bottleneck or nn.Linear(context_dim, hidden)
        self.second, self.last = nn.Linear(hidden, hidden), nn.Linear(hidden, out)
        nn.init.normal_(self.last.weight, std=0.02 / math.sqrt(hidden))
        nn.init.zeros_(self.last.bias)

    def forward(self, context: Tensor, octave: Tensor) -> Tensor:
        """Maps the context (B, C) and the LR size's octave (B,) to (B, out)."""
        hidden = F.gelu(self.first(self.norm(context)) + self._code(octave))
        return self.last(F.gelu(self.second(hidden)))

    def _code(self, octave: Tensor) -> Tensor:
        """A fixed code of the octave, half sines, half cosines (B, hidden)."""
        half = self.second.in_features // 2
        angles = octave[:, None] * torch.linspace(0.5, 8.0, half, device=octave.device) * math.pi
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class GaussianPosterior(nn.Module):
    """A Gaussian with learned scales and correlations of low rank.

    Args:
        context_dim: Width of the context.
        dim: Width D of u.
        rank: Columns of V.
        context_rank: See `ContextNetwork`.
    """

    width: Tensor
    wobble: Tensor

    def __init__(self, context_dim: int, dim: int, rank: int = 4, context_rank: int = 0) -> None:
        super().__init__()
        self.dim, self.rank = dim, rank
        self.noise_dim = dim + rank + 1
        self.network = ContextNetwork(context_dim, dim * (2 + rank), rank=context_rank)
        self.basis = nn.Parameter(torch.eye(dim))  # A
        # r₀ and τ, set by `training.coverage.calibrate`; the fit itself takes the width for certain.
        self.register_buffer("width", torch.ones(()))
        self.register_buffer("wobble", torch.zeros(()))

    def parts(self, context: Tensor, octave: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gives m (B, D), s (B, D) and V (B, D, rank)."""
        mean, scale, factor = self.network(context, octave).float().split([self.dim, self.dim, self.dim * self.rank], 1)
        # Softplus keeps s above the floor with a gradient; with 0.52 it starts near 1.
        scale = math.exp(LOG_SCALE_FLOOR) + F.softplus(scale + 0.52)
        return mean, scale, factor.unflatten(1, (self.dim, self.rank))

    def log_prob(self, context: Tensor, octave: Tensor, u: Tensor) -> Tensor:
        """The log-density of codes.

        Args:
            context: Features of the encoder (B, C).
            octave: Of the LR size (B,), see `Encoder.octave`.
            u: Whitened codes (B, D), or (n, B, D).

        Returns:
            log q(u | c) (B,), or (n, B), in nats.
        """
        mean, scale, factor = self.parts(context, octave)
        t = torch.linalg.solve(self.basis.float(), u[..., None])[..., 0]
        inside = LowRankMultivariateNormal(torch.zeros_like(mean), factor, scale.square(), validate_args=False)
        places, weights = (torch.from_numpy(values).to(t) for values in np.polynomial.hermite_e.hermegauss(NODES))
        widths = self.width * (self.wobble * places).exp() if self.wobble > 0 else self.width[None]  # (n,)
        shares = weights / weights.sum() if self.wobble > 0 else torch.ones_like(widths)
        # One width at a time: N(x; m, r² Σ) = N((x − m) / r; 0, Σ) / r^D.
        logs = [
            inside.log_prob((t - mean) / r) - self.dim * r.log() + p.log() for r, p in zip(widths, shares, strict=True)
        ]
        return torch.logsumexp(torch.stack(logs), dim=0) - torch.linalg.slogdet(self.basis.float()).logabsdet

    def mean(self, context: Tensor, octave: Tensor) -> Tensor:
        """The mean of u (B, D)."""
        return self.parts(context, octave)[0] @ self.basis.T

    def sample(self, context: Tensor, octave: Tensor, noise: Tensor) -> Tensor:
        """Maps standard normal noise (B, n, D + rank + 1) to samples of u (B, n, D)."""
        mean, scale, factor = self.parts(context, octave)
        own, shared, length = noise.split([self.dim, self.rank, 1], dim=-1)
        width = self.width * (self.wobble * length).exp()  # (B, n, 1)
        t = mean[:, None] + width * (own * scale[:, None] + shared @ factor.transpose(1, 2))
        return t @ self.basis.T


class FlowPosterior(nn.Module):
    """A conditional flow: affine couplings (RealNVP, Dinh et al. 2017) on top of a Gaussian with a diagonal.

    Args:
        context_dim: Width of the context.
        dim: Width D of u.
        transforms: Couplings.
        hidden: Width of the networks in them.
        condition: Width of what they see of the context.
        context_rank: See `ContextNetwork`.
    """

    width: Tensor

    def __init__(
        self,
        context_dim: int,
        dim: int,
        transforms: int = 4,
        hidden: int = 384,
        condition: int = 64,
        context_rank: int = 0,
    ) -> None:
        super().__init__()
        import zuko  # late: other distributions do without

        self.dim, self.noise_dim = dim, dim
        self.condition = condition
        self.network = ContextNetwork(context_dim, 2 * dim + condition, rank=context_rank)
        self.basis = nn.Parameter(torch.eye(dim))
        self.flow = zuko.flows.MAF(
            dim, condition, transforms=transforms, hidden_features=(hidden, hidden), passes=2, randperm=True
        )
        self.register_buffer("width", torch.ones(()))

    def _parts(self, context: Tensor, octave: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, scale, condition = self.network(context, octave).float().split([self.dim, self.dim, self.condition], 1)
        return mean, self.width * (math.exp(LOG_SCALE_FLOOR) + F.softplus(scale + 0.52)), condition

    def log_prob(self, context: Tensor, octave: Tensor, u: Tensor) -> Tensor:
        """See `GaussianPosterior.log_prob`."""
        mean, scale, condition = self._parts(context, octave)
        t = torch.linalg.solve(self.basis.float(), u[..., None])[..., 0]
        inside = self.flow(condition).log_prob((t - mean) / scale) - scale.log().sum(dim=1)
        return inside - torch.linalg.slogdet(self.basis.float()).logabsdet

    def mean(self, context: Tensor, octave: Tensor) -> Tensor:
        """Where the flow puts zero noise (B, D); not quite the mean."""
        return self.sample(context, octave, context.new_zeros(context.shape[0], 1, self.dim))[:, 0]

    def sample(self, context: Tensor, octave: Tensor, noise: Tensor) -> Tensor:
        """Maps standard normal noise (B, n, D) to samples of u (B, n, D)."""
        mean, scale, condition = self._parts(context, octave)
        t = self.flow(condition).transform.inv(noise.transpose(0, 1)).transpose(0, 1)  # (B, n, D)
        return (mean[:, None] + scale[:, None] * t) @ self.basis.T


def make_posterior(kind: str, context_dim: int, dim: int, context_rank: int = 0) -> GaussianPosterior | FlowPosterior:
    """Makes an untrained distribution.

    Args:
        kind: One of `KINDS`.
        context_dim: Width of the context.
        dim: Width D of u.
        context_rank: See `ContextNetwork`.

    Returns:
        The distribution.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"Expected a distribution {' or '.join(KINDS)}, got {kind!r}.")
    network = GaussianPosterior if kind == "gaussian" else FlowPosterior
    return network(context_dim, dim, context_rank=context_rank)
