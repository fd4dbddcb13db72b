"""Optimizers for `search.loop`: each search takes its own steps, as if it were alone. A step is 3 generator calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from search.loop import Point, Rows

TINY = 1e-20  # keeps quotients of squared norms finite; far below any that matters


def constant(rate: float) -> Callable[[int], float]:
    """The learning rate that never changes."""
    return lambda number: rate


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015), with a learning rate that may depend on the step.

    x ← x − η_t m̂ / (√v̂ + 1e-8)
    """

    rate: Callable[[int], float]  # η for a step, counted from 0
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the first and of the second moment
    nfe = 3

    def init(self, variables: Rows) -> Rows:
        """Moments of zero."""
        return {f"{moment} {name}": torch.zeros_like(x) for name, x in variables.items() for moment in ("m", "v")}

    def step(self, number: int, point: Point, state: Rows) -> tuple[Rows, Rows]:
        """Takes a step along the gradient of the loss."""
        (b1, b2), rate = self.betas, self.rate(number)
        variables: Rows = {}
        moments: Rows = {}
        for name, gradient in point.gradient().items():
            m = torch.lerp(gradient, state[f"m {name}"], b1)
            v = torch.lerp(gradient.square(), state[f"v {name}"], b2)
            unbiased = (v / (1 - b2 ** (number + 1))).sqrt() + 1e-8
            variables[name] = point.variables[name].detach() - rate / (1 - b1 ** (number + 1)) * m / unbiased
            moments |= {f"m {name}": m, f"v {name}": v}
        return variables, moments


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS for least squares, loss = ‖ρ‖² (Nocedal & Wright 2006, algorithm 7.4).

    d = −H g by the two-loop recursion, x ← x + α d with α = −⟨ρ, Δ⟩ / ‖Δ‖² in the first step, 1 in later ones

    Δ = (ρ(x + h d) − ρ(x)) / h is the change along d, which costs one call more. Once H has seen a step it knows the
    scale.
    """

    memory: int = 10  # pairs of steps and gradient changes that H is made of
    probe: float = 0.02  # root mean square of h d
    nfe = 3

    def init(self, variables: Rows) -> Rows:
        """An empty memory."""
        x = _flat(variables)
        pairs = x.new_zeros(len(x), self.memory, x.shape[1])  # the oldest first; zero where there is none
        return {"x": x, "g": torch.zeros_like(x), "s": pairs, "y": pairs}

    def step(self, number: int, point: Point, state: Rows) -> tuple[Rows, Rows]:
        """Takes a step along −H g."""
        x, g = _flat(point.variables), _flat(point.gradient())
        s, y = state["s"], state["y"]
        if number == 0:
            move = self.probe * -g / (g.square().mean(dim=1, keepdim=True) + TINY).sqrt()  # h d
            change = point.residuals_at(_unflat(x + move, point.variables)) - point.residuals  # (N, Q)
            move = -_dot(point.residuals, change) / (_dot(change, change) + TINY) * move
        else:
            s, y = _append(s, x - state["x"]), _append(y, g - state["g"])
            move = -_inverse_hessian(g, s, y)
        return _unflat(x + move, point.variables), {"x": x, "g": g, "s": s, "y": y}


def _append(pairs: Tensor, newest: Tensor) -> Tensor:
    return torch.cat([pairs[:, 1:], newest[:, None]], dim=1)


def _inverse_hessian(g: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """The two-loop recursion H g for g (N, P) and pairs (N, m, P); those without positive curvature do not count."""
    curvature = (s * y).sum(dim=2, keepdim=True)  # (N, m, 1)
    usable = curvature > 1e-8 * (y * y).sum(dim=2, keepdim=True).clamp(min=TINY)
    rho = torch.where(usable, 1 / curvature, 0.0)
    alphas = []
    scale = torch.ones_like(rho[:, 0])
    for i in reversed(range(s.shape[1])):
        alphas.append(rho[:, i] * _dot(s[:, i], g))
        g = g - alphas[-1] * y[:, i]
    for i in range(s.shape[1]):  # γ = sᵀy / yᵀy of the newest pair that counts
        scale = torch.where(usable[:, i], curvature[:, i] / _dot(y[:, i], y[:, i]).clamp(min=TINY), scale)
    g = scale * g
    for i, alpha in enumerate(reversed(alphas)):
        g = g + s[:, i] * (alpha - rho[:, i] * _dot(y[:, i], g))
    return g


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (N, P) -> (N, 1)."""
    return (a * b).sum(dim=1, keepdim=True)


def _flat(variables: Rows) -> Tensor:
    return torch.cat([tensor.detach().flatten(1) for tensor in variables.values()], dim=1)  # (N, P)


def _unflat(flat: Tensor, like: Rows) -> Rows:
    parts = flat.split([tensor[0].numel() for tensor in like.values()], dim=1)
    return {name: part.view_as(tensor) for part, (name, tensor) in zip(parts, like.items(), strict=True)}
