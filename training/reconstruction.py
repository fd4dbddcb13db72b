"""Photos as a grown generator reconstructs them, to compare with the photos themselves.

The encoder belongs to the generator that this one has grown from. The old blocks still understand its codes and
details, so the new block learns from the photo itself what is finer, and needs no discriminator for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.operator import Downscale
from losses.perceptual import LPIPS
from models.bundle import load_bundle
from models.generator import SynthesisNetwork
from models.layers import Frozen


class Reconstruction(Frozen):
    """Reconstructs photos by a generator and compares; frozen, and not part of any checkpoint.

    Args:
        bundle: Folder of a bundle for the smaller generator.
    """

    def __init__(self, bundle: str) -> None:
        super().__init__()
        self.encoder = load_bundle(bundle).encoder
        self.lpips = LPIPS()
        self.freeze()

    def forward(self, synthesis: SynthesisNetwork, photos: Tensor) -> Tensor:
        """Reconstructs photos.

        Args:
            synthesis: The generator's; its stored noise is used, as in the encoder's training.
            photos: Images (B, 3, R, R) in [-1, 1].

        Returns:
            Images (B, 3, R, R).

        Raises:
            ValueError: If the bundle's styles do not fit the generator.
        """
        with torch.no_grad():
            encoding = self.encoder(Downscale(min(self.encoder.resolution, photos.shape[3]))(photos))
        ws = encoding.ws[:, 0]
        if ws.shape[2] != synthesis.w_dim or ws.shape[1] > synthesis.num_ws:
            raise ValueError(
                f"Expected a bundle for a generator of width {synthesis.w_dim} and at most {synthesis.num_ws} styles, "
                f"got {ws.shape[2]} and {ws.shape[1]}; set reconstruction_bundle to the one that it has grown from."
            )
        codes = torch.cat([ws, ws[:, -1:].expand(-1, synthesis.num_ws - ws.shape[1], -1)], dim=1)
        # `.forward` passes by a compiled synthesis, which knows no details.
        return synthesis.forward(codes, details={size: maps[:, 0] for size, maps in encoding.details.items()})

    def distance(self, reconstructed: Tensor, photos: Tensor) -> tuple[Tensor, Tensor]:
        """Compares.

        Args:
            reconstructed: Images (B, 3, R, R).
            photos: Their originals (B', 3, R, R), perhaps followed by more.

        Returns:
            LPIPS and mean square difference (B,) each.
        """
        photos = photos[: len(reconstructed)]
        with torch.no_grad():
            wanted = self.lpips.features(photos)
        lpips = self.lpips.distance(self.lpips.features(reconstructed), wanted)
        return lpips, (reconstructed - photos).square().mean(dim=(1, 2, 3))
