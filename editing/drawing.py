"""Edits as the commands that draw with torch apply them: codes in, edited codes and what is to be told of them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from editing.boundary import apply_edits
from editing.command import Editing
from editing.consistent import keep_lr, visible_change
from models.generator import SynthesisNetwork


@dataclass(frozen=True)
class Edited:
    """Codes after editing.

    Attributes:
        ws: Codes (k, L, D).
        visible: Root mean square change of each downscaled picture, in units of [0, 1] pictures; empty without edits.
        kept: Share of each face's change that is left where what shows was projected out, else None.
    """

    ws: Tensor
    visible: list[float]
    kept: list[float] | None = None


def edit_codes(
    synthesis: SynthesisNetwork, ws: Tensor, noise: list[Tensor] | None, lr_size: int, editing: Editing
) -> Edited:
    """Edits the candidates of one face.

    Args:
        synthesis: Draws.
        ws: Codes (k, L, D).
        noise: Maps (k, 1, H, W) per layer in place of the stored ones.
        lr_size: Size s of the low-resolution picture in pixels.
        editing: What is asked for.

    Returns:
        The edited codes; without edits the same.
    """
    if not editing.edits:
        return Edited(ws, [])
    edited, kept = torch.from_numpy(apply_edits(ws.cpu().numpy(), editing.edits)).to(ws), None
    if editing.consistent:
        result = keep_lr(synthesis, ws, edited - ws, lr_size, noise)
        edited, kept = result.ws, result.kept.tolist()
    return Edited(edited, visible_change(synthesis, ws, edited, lr_size, noise).tolist(), kept)


def drawer(synthesis: SynthesisNetwork, noise: list[Tensor] | None) -> Callable[[np.ndarray], np.ndarray]:
    """Gives what draws codes (k, L, D) as arrays (k, 3, R, R) in [-1, 1], with the maps of a search if it has any.

    Args:
        synthesis: Draws.
        noise: Maps (k, 1, H, W) per layer in place of the stored ones.
    """
    device = next(synthesis.parameters()).device

    @torch.inference_mode()
    def drawn(ws: np.ndarray) -> np.ndarray:
        return synthesis(torch.from_numpy(ws).to(device), noise=noise).clamp(-1, 1).cpu().numpy()

    return drawn
