"""What all encoders share: how they are called, their candidates, and the learned feedback on top of them.

An encoder looks at LR faces that lie on a canvas of one size (`read`), makes codes of what it saw (`codes`), and gives
further candidates around the best guess (`moves`). Everything else is here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.operator import Downscale
from models.feedback import HIDDEN, Feedback, on_canvas
from models.latents import LatentStatistics
from models.posterior import make_posterior

COARSE_STYLES, MEDIUM_STYLES = 3, 4  # as in pSp; all further ones are fine


class EncoderBase(nn.Module):
    """Encodes LR faces of any size from 4 px to the generator's resolution.

    Args:
        resolution: Size R of the generator's faces in pixels.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        canvas: Size that LR faces are brought to.
        feedback: Passes of learned feedback that a bundle takes by default, see `models.feedback`; 0 for no network.
        rank: Directions of the coordinates of `models.curvature`, for the feedback and for scaled heads.
        posterior: Distribution that the candidates come from, see `models.posterior`; None for the encoder's own way.
        context_dim: Width of what the posterior sees.
        feedback_hidden: See `models.feedback.Feedback`.
        context_rank: See `models.posterior.ContextNetwork`.
        feedback_small_rank: See `models.feedback.Feedback`.
    """

    spread: Tensor
    spread_sizes: Tensor

    def __init__(
        self,
        resolution: int,
        num_ws: int,
        w_dim: int,
        canvas: int,
        feedback: int = 0,
        rank: int = 0,
        posterior: str | None = None,
        context_dim: int = 0,
        feedback_hidden: int = HIDDEN,
        context_rank: int = 0,
        feedback_small_rank: int = 0,
    ) -> None:
        super().__init__()
        self.resolution, self.num_ws, self.w_dim, self.canvas = resolution, num_ws, w_dim, canvas
        self.config: dict[str, Any] = {"resolution": resolution, "num_ws": num_ws, "w_dim": w_dim}
        self.latents = LatentStatistics(w_dim, num_ws, rank)
        shape = resolution, num_ws, w_dim
        self.feedback = Feedback(*shape, feedback_hidden, feedback_small_rank) if feedback else None
        self.posterior = None if posterior is None else make_posterior(posterior, context_dim, w_dim, context_rank)
        sizes = [2**i for i in range(2, int(math.log2(resolution)) + 1)]
        self.register_buffer("spread_sizes", torch.tensor(sizes, dtype=torch.float32))
        self.register_buffer("spread", torch.zeros(len(sizes), num_ws))

    @property
    def noise_dim(self) -> int:
        """Width of the noise that a candidate is made from."""
        return self.w_dim if self.posterior is None else self.posterior.noise_dim

    def passes(self, wanted: int | None) -> int:
        """Passes of learned feedback: as many as wanted, or what a bundle takes by default if None."""
        return self.config.get("feedback", 0) if wanted is None else wanted

    # ---------------------------------------------------------------- what an encoder does in its own way

    def read(self, canvas: Tensor, size: Tensor) -> list[Tensor]:
        """Looks at faces that are already on the canvas; those of one batch may have different sizes.

        Args:
            canvas: LR faces as `on_canvas` gives them (B, 3, canvas, canvas), in [-1, 1].
            size: Their LR sizes in pixels (B,).

        Returns:
            Features for the coarse, medium and fine styles.
        """
        raise NotImplementedError

    def codes(self, features: list[Tensor]) -> Tensor:
        """Maps features to the best guess (B, L, D)."""
        raise NotImplementedError

    def on_canvas(self, lr: Tensor) -> Tensor:
        """Brings LR faces (B, 3, s, s) of any one size to the canvas, bicubically."""
        return on_canvas(lr, self.canvas)

    def context(self, features: list[Tensor]) -> Tensor:
        """What the posterior sees of the features: those for the coarse and the medium styles (B, C)."""
        return torch.cat(features[:2], dim=1)

    def moves(self, features: list[Tensor], best: Tensor, size: Tensor, noise: Tensor) -> Tensor:
        """How candidates differ from the best guess where the spread is 1.

        w' − w°, with w' a sample of the posterior and w° its mean; or of all the generator's codes and their mean,
        where there is no posterior.

        Args:
            features: See `read`; flat ones (B, C), of which the posterior sees the coarse and the medium.
            best: Best guess (B, L, D).
            size: LR sizes in pixels (B,).
            noise: Standard normal (B, n, noise_dim).

        Returns:
            Moves (B, n, L, D), or (B, n, 1, D) where they are the same for all layers.
        """
        latents = self.latents
        if self.posterior is None:
            return (latents.sample(noise) - latents.w_avg)[:, :, None]
        context, octave = self.context(features), self.octave(size)
        samples = latents.sample(self.posterior.sample(context, octave, noise))
        return (samples - latents.sample(self.posterior.mean(context, octave))[:, None])[:, :, None]

    # ---------------------------------------------------------------- calling it

    def forward(
        self, lr: Tensor, k: int = 1, rng: np.random.Generator | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Encodes faces; the first of the k codes is the best guess.

        Args:
            lr: LR faces (B, 3, s, s) in [-1, 1], 4 ≤ s ≤ R.
            k: Codes per face.
            rng: Source of the further codes; a fixed seed if None.
            temperature: Scales how far the further codes lie from the best guess; 0 repeats it.

        Returns:
            Style codes (B, k, L, D).

        Raises:
            ValueError: If the faces' shape or k is out of range.
        """
        if lr.ndim != 4 or lr.shape[1] != 3 or lr.shape[2] != lr.shape[3]:
            raise ValueError(f"Expected square colour faces (B, 3, s, s), got {tuple(lr.shape)}.")
        if not 4 <= lr.shape[3] <= self.resolution:
            raise ValueError(
                f"Expected faces of 4 to {self.resolution} px, got {lr.shape[3]} px; downscale larger ones first."
            )
        if k < 1:
            raise ValueError(f"Expected k ≥ 1 codes per face, got {k}.")
        size = torch.full((len(lr),), lr.shape[3], device=lr.device)
        if k == 1:
            return self.best_guess(self.on_canvas(lr), size)[:, None]
        rng = np.random.default_rng(0) if rng is None else rng
        noise = torch.from_numpy(rng.standard_normal((len(lr), k - 1, self.noise_dim), dtype=np.float32)).to(lr.device)
        return self.candidates(self.on_canvas(lr), size, noise, temperature * self.spread_at(lr.shape[3]))

    def best_guess(self, canvas: Tensor, size: Tensor) -> Tensor:
        """Encodes faces that are on the canvas: codes (B, L, D) for the arguments of `read`."""
        return self.codes(self.read(canvas, size))

    def candidates(self, canvas: Tensor, size: Tensor, noise: Tensor, spread: Tensor) -> Tensor:
        """Encodes faces that are on the canvas: the best guess and further candidates.

        w_l = best_l + spread_l m_l, with m the `moves`.

        Args:
            canvas: See `read`.
            size: See `read`.
            noise: Standard normal (B, k − 1, noise_dim).
            spread: How far each layer moves (L,), or (B, L).

        Returns:
            Style codes (B, k, L, D).
        """
        features = self.read(canvas, size)
        best = self.codes(features)  # (B, L, D)
        moves = self.moves(features, best, size, noise)
        others = best[:, None] + spread[..., None, :, None] * moves  # (B, k - 1, L, D)
        return torch.cat([best[:, None], others], dim=1)

    def octave(self, size: Tensor) -> Tensor:
        """LR sizes in pixels (B,) as the networks see them: about [0, 1] (B,)."""
        return (size.to(self.latents.w_avg.dtype) / self.resolution).log2() / 4 + 1

    def spread_at(self, size: int) -> Tensor:
        """Interpolates the spread (L,) for an LR size in pixels, linearly in its logarithm."""
        octaves = self.spread_sizes.log2()
        position = (math.log2(size) - float(octaves[0])) / float(octaves[-1] - octaves[0]) * (len(octaves) - 1)
        row = min(max(int(position), 0), len(octaves) - 2)
        return torch.lerp(self.spread[row], self.spread[row + 1], position - row)

    # ---------------------------------------------------------------- learned feedback

    def correct(self, lr: Tensor, images: Tensor, ws: Tensor) -> Tensor:
        """Corrects codes by what their faces, downscaled, lack of the LR pictures: one pass of the learned feedback.

        Args:
            lr: LR faces (B, 3, s, s) in [-1, 1].
            images: The faces that the codes draw (B, 3, R, R), about [-1, 1].
            ws: The codes (B, L, D).

        Returns:
            Better codes (B, L, D).

        Raises:
            ValueError: If the encoder has no feedback.
        """
        if self.feedback is None:
            raise ValueError("Expected an encoder with feedback, this one has none; train one with feedback_64.yaml.")
        canvas = self.feedback.canvas
        residual = on_canvas(lr - Downscale(lr.shape[3])(images), canvas)
        shrunk = on_canvas(images, 2 * canvas) if images.shape[3] != 2 * canvas else images
        size = torch.full((len(lr),), lr.shape[3], device=lr.device)
        return self.correct_on_canvas(on_canvas(lr, canvas), residual, shrunk, size, ws)

    def correct_on_canvas(self, lr: Tensor, residual: Tensor, images: Tensor, size: Tensor, ws: Tensor) -> Tensor:
        """As `correct`, for pictures on the canvas of `models.feedback.Feedback`; rows may have different LR sizes."""
        assert self.feedback is not None
        return ws + self.latents.unscale(self.feedback(lr, residual, images, size, self.latents.offsets(ws)))
