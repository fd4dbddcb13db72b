"""Optimisers for `search.loop`: each row takes its own steps, as if it were alone.

    Adam          3 passes a step
    LBFGS         3, and 2 more where the step length is made exact by a forward-mode derivative
    GaussNewton   1 + 4 n: n steps of conjugate gradients on the linearised residuals

The last two are for least squares, loss = ‖ρ‖². A 16 px picture has only 768 numbers to match, so ρ is nearly linear
where the start is near, and second-order steps reach the goal with less work.
"""

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

    Args:
        rate: Gives η for a step, counted from 0.
        betas: Decay of the first and of the second moment.
    """

    rate: Callable[[int], float]
    betas: tuple[float, float] = (0.9, 0.999)
    passes = 3

    def start(self, variables: Rows) -> Rows:
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
class GaussNewton:
    """Gauss-Newton by conjugate gradients: minimises ‖ρ + J d‖² over d in a Krylov space, from d = 0.

    Few products also regularise: directions that change the residuals little are hardly touched. A step that made
    things worse is taken back, and a quarter of it tried.

    Args:
        products: Steps n of conjugate gradients (CGLS), each with one product by J and one by Jᵀ.

    References:
        Björck 1996, Numerical Methods for Least Squares Problems, algorithm 7.4.1 (CGLS).
    """

    products: int = 4

    @property
    def passes(self) -> int:
        """Of a step: 1 + 4 n."""
        return 1 + 4 * self.products

    def start(self, variables: Rows) -> Rows:
        """No step yet: whatever comes is better than an infinite loss."""
        x = _flat(variables)
        return {"x": x, "moved": torch.zeros_like(x), "loss": x.new_full((len(x), 1), torch.inf)}

    def step(self, number: int, point: Point, state: Rows) -> tuple[Rows, Rows]:
        """Takes the step of the linearised problem, or a quarter of the last one from where that began."""
        x, loss = _flat(point.variables), _dot(point.residuals, point.residuals)
        worse = loss > state["loss"]
        kept = {"x": x, "moved": self._solve(point), "loss": loss}
        before = {**state, "moved": state["moved"] / 4}
        state = {name: torch.where(worse, before[name], kept[name]) for name in kept}
        return _unflat(state["x"] + state["moved"], point.variables), state

    def _solve(self, point: Point) -> Tensor:
        remaining = -point.residuals  # (N, Q)
        slope = _flat(point.pull_back(remaining))  # (N, P)
        moved, direction, size = torch.zeros_like(slope), slope, _dot(slope, slope)
        for i in range(self.products):
            image = point.push_forward(_unflat(direction, point.variables))  # (N, Q)
            length = size / (_dot(image, image) + TINY)
            moved = moved + length * direction
            if i == self.products - 1:
                break
            remaining = remaining - length * image
            slope = _flat(point.pull_back(remaining))
            size, before = _dot(slope, slope), size
            direction = slope + size / (before + TINY) * direction
        return moved  # (N, P)


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS directions; the first steps have the length that minimises the linearised residuals.

    d = −H g by the two-loop recursion, x ← x + α d with α = −⟨ρ, J d⟩ / ‖J d‖², later 1

    The first step knows no scale yet. Once H has seen a step, α is near 1, and to compute it costs more than it gives.

    Args:
        memory: Pairs of steps and gradient changes that H is made of.
        exact: Steps whose length is computed.

    References:
        Nocedal & Wright 2006, Numerical Optimization, algorithm 7.4.
    """

    memory: int = 10
    exact: int = 1
    passes = 3

    def start(self, variables: Rows) -> Rows:
        """An empty memory."""
        x = _flat(variables)
        pairs = x.new_zeros(len(x), self.memory, x.shape[1])  # the oldest first; zero where there is none
        return {"x": x, "g": torch.zeros_like(x), "s": pairs, "y": pairs}

    def step(self, number: int, point: Point, state: Rows) -> tuple[Rows, Rows]:
        """Takes a step along −H g."""
        x, g = _flat(point.variables), _flat(point.gradient())
        s, y = state["s"], state["y"]
        if number > 0:
            s, y = _append(s, x - state["x"]), _append(y, g - state["g"])
        direction = -_inverse_hessian(g, s, y)
        if number < self.exact:
            image = point.push_forward(_unflat(direction, point.variables))  # (N, Q)
            direction = -_dot(point.residuals, image) / (_dot(image, image) + TINY) * direction
        return _unflat(x + direction, point.variables), {"x": x, "g": g, "s": s, "y": y}


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
    """Inner products of rows, (N, P) -> (N, 1)."""
    return (a * b).sum(dim=1, keepdim=True)


def _flat(variables: Rows) -> Tensor:
    return torch.cat([tensor.detach().flatten(1) for tensor in variables.values()], dim=1)  # (N, P)


def _unflat(flat: Tensor, like: Rows) -> Rows:
    parts = flat.split([tensor[0].numel() for tensor in like.values()], dim=1)
    return {name: part.view_as(tensor) for part, (name, tensor) in zip(parts, like.items(), strict=True)}
