"""Edits that keep the low-resolution picture: the part of an edit that would show in it is projected out.

With J = ∂ D(g(w)) / ∂ w at a face's codes, an offset δ changes the LR picture by J δ to first order. The nearest offset
that does not change it is

    δ' = δ − Jᵀ (J Jᵀ + λ)⁻¹ J δ,

by conjugate gradients, without ever forming J; λ keeps directions that hardly show out of it. The edit is taken in a
few parts, each projected where the last one ended, for g is not linear, and the small errors of each are corrected by
the next. What an edit is about may show in the LR picture entirely, such as the colour of hair: then little of it is
left, and the report says so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from data.operator import Downscale
from models.generator import SynthesisNetwork
from search.loop import Codes, Point, Problem, Rows

PARTS = 4
PRODUCTS = 20  # of conjugate gradients, each a product with J and one with Jᵀ
DAMPING = 1e-3  # λ, of the largest curvature


@dataclass(frozen=True)
class Consistent:
    """Edited codes, and what was left of the edit.

    Attributes:
        ws: Codes (N, L, D).
        kept: Root mean square change of the face, as a share of that by the edit as it was asked for (N,).
    """

    ws: Tensor
    kept: Tensor


def visible_change(
    synthesis: SynthesisNetwork, before: Tensor, after: Tensor, lr_size: int, noise: list[Tensor] | None = None
) -> Tensor:
    """Measures the part of an edit that shows in the LR picture.

    Args:
        synthesis: Draws.
        before: Codes (N, L, D).
        after: Edited codes (N, L, D).
        lr_size: Size s of the LR picture in pixels.
        noise: Maps in place of the stored ones.

    Returns:
        Root mean square of D(g(after)) − D(g(before)) in units of [0, 1] pictures (N,).
    """
    operator = Downscale(lr_size)
    with torch.inference_mode():
        lr = [operator(synthesis(ws, noise=noise).clamp(-1, 1)) for ws in (before, after)]
    return ((lr[1] - lr[0]) / 2).square().mean(dim=(1, 2, 3)).sqrt()


def keep_lr(
    synthesis: SynthesisNetwork,
    ws: Tensor,
    offset: Tensor,
    lr_size: int,
    noise: list[Tensor] | None = None,
    parts: int = PARTS,
    products: int = PRODUCTS,
) -> Consistent:
    """Edits faces as far as their LR pictures stay as they are.

    Args:
        synthesis: Draws.
        ws: Codes (N, L, D).
        offset: The edit (L, D), or one for each face (N, L, D).
        lr_size: Size s of the LR picture in pixels.
        noise: Maps (N, 1, H, W) per layer in place of the stored ones.
        parts: Steps that the edit is taken in.
        products: Steps of conjugate gradients at each.

    Returns:
        The edited codes.
    """
    offset = offset.expand_as(ws).to(ws)
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")  # torch's own forward-mode rules still use it
        start, step, current = ws.clone(), offset.clone() / parts, ws.clone()
        problem = Problem(lambda rows, _: Codes(rows["ws"], noise), synthesis, Downscale(lr_size))
        with torch.no_grad():
            target = Downscale(lr_size)(synthesis(start, noise=noise))  # (N, 3, s, s)
        for _ in range(parts):
            point = Point(problem, {"ws": current}, {}, target)
            # What earlier parts left in the LR picture is taken back along with the part of this one.
            seen = point.push_forward({"ws": step}) + point.residuals
            current = current + step - _pull_back_solved(point, seen, products)
        for _ in range(2):  # what the last part left
            point = Point(problem, {"ws": current}, {}, target)
            current = current - _pull_back_solved(point, point.residuals, products)
    with torch.no_grad():
        before, asked, done = (synthesis(codes, noise=noise) for codes in (start, start + offset, current))
        changes = [(after - before).square().mean(dim=(1, 2, 3)).sqrt() for after in (done, asked)]
    return Consistent(current.detach(), changes[0] / changes[1].clamp_min(1e-12))


def _pull_back_solved(point: Point, seen: Tensor, products: int) -> Tensor:
    """Gives Jᵀ (J Jᵀ + λ)⁻¹ r for r (N, M), as (N, L, D): the least offset that makes the LR picture change by r."""

    def curved(y: Tensor) -> tuple[Tensor, Rows]:
        pulled = point.pull_back(y)
        return point.push_forward(pulled), pulled

    solution, residual, direction = torch.zeros_like(seen), seen, seen
    norm = seen.square().sum(dim=1, keepdim=True)  # (N, 1)
    damping: Tensor | None = None
    for _ in range(products):
        product, _ = curved(direction)
        if damping is None:  # the first direction is close to those that show most
            damping = DAMPING * (product * direction).sum(1, keepdim=True) / norm.clamp_min(1e-20)
        product = product + damping * direction
        length = norm / (direction * product).sum(dim=1, keepdim=True).clamp_min(1e-20)
        solution, residual = solution + length * direction, residual - length * product
        new = residual.square().sum(dim=1, keepdim=True)
        direction, norm = residual + new / norm.clamp_min(1e-20) * direction, new
    return point.pull_back(solution)["ws"].detach()
