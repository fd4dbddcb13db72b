"""The StyleGAN2 generator: a mapping network z → w and a synthesis network with skip connections to RGB.

Written from Karras et al. 2020 in plain PyTorch, with the semantics and tensor names of the official StyleGAN2-ADA
code, so that official weights fit. Modulated convolutions take their scaled form: the style multiplies the input, the
demodulation multiplies the output. It is exact, faster on the CPU than a grouped convolution with one kernel per
sample, and exports to ONNX with a dynamic batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import banded
from models.layers import EqualLinear, SynthesisBlock, SynthesisLayer

NOISE_MODES = ("const", "random", "none")


def channels_by_resolution(resolution: int, base: int = 32768, maximum: int = 512) -> tuple[int, ...]:
    """Gives the feature widths of StyleGAN2, min(base / r, maximum) for r = 4, 8, …, resolution.

    The official base is 32768; ADA's small configurations have 16384.
    """
    return tuple(min(base // 2**i, maximum) for i in range(2, int(math.log2(resolution)) + 1))


class MappingNetwork(nn.Module):
    """The mapping network f: z → w, a multilayer perceptron on the normalised latent.

    Args:
        z_dim: Width of z.
        w_dim: Width D of w.
        num_layers: Depth; 8 in the paper, 2 in some ADA configurations.
        num_ws: Number of styles L that w is repeated to.
        lr_multiplier: Relative learning rate of its layers.
    """

    w_avg: Tensor

    def __init__(self, z_dim: int, w_dim: int, num_layers: int, num_ws: int, lr_multiplier: float = 0.01) -> None:
        super().__init__()
        self.z_dim = z_dim
        self.num_layers = num_layers
        self.num_ws = num_ws
        for i in range(num_layers):
            width = z_dim if i == 0 else w_dim
            setattr(self, f"fc{i}", EqualLinear(width, w_dim, lr_multiplier=lr_multiplier, activate=True))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(self, z: Tensor, truncation_psi: float = 1.0) -> Tensor:
        """Maps latents to styles, w = w̄ + ψ (f(z) − w̄).

        Args:
            z: Latents (B, Z), standard normal; each is scaled to mean square 1.
            truncation_psi: ψ; 1 keeps the full variety, 0 gives the mean face.

        Returns:
            Styles (B, L, D), the same w in every layer.

        Raises:
            ValueError: If z has the wrong shape.
        """
        if z.ndim != 2 or z.shape[1] != self.z_dim:
            raise ValueError(f"Expected latents z (B, {self.z_dim}), got {tuple(z.shape)}.")
        w = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        for i in range(self.num_layers):
            w = getattr(self, f"fc{i}")(w)
        if truncation_psi != 1.0:
            w = torch.lerp(self.w_avg.to(w.dtype), w, truncation_psi)
        return w.unsqueeze(1).expand(-1, self.num_ws, -1)


class SynthesisNetwork(nn.Module):
    """The synthesis network g: W+ → images.

    Args:
        resolution: Output size in pixels.
        channels: Widths per resolution, coarse to fine.
        w_dim: Width of the style codes.
        conv_clamp: See `SynthesisLayer`.

    Attributes:
        checkpointed: Number of the finest blocks that keep nothing for the backward pass, but compute it again there:
            one of them at 1024 px halves what is kept, and takes a fifth more time.
    """

    def __init__(self, resolution: int, channels: Sequence[int], w_dim: int, conv_clamp: float | None = None) -> None:
        super().__init__()
        self.w_dim = w_dim
        self.resolutions = [2**i for i in range(2, int(math.log2(resolution)) + 1)]
        below = 0
        for size, width in zip(self.resolutions, channels, strict=True):
            setattr(self, f"b{size}", SynthesisBlock(below, width, w_dim, size, conv_clamp))
            below = width
        self.num_layers = 2 * len(self.resolutions) - 1
        self.num_ws = self.num_layers + 1
        self.checkpointed = 0
        self._bfloat16 = False

    def in_bfloat16(self) -> SynthesisNetwork:
        """Gives the same network, with the same weights, that computes in bfloat16; its images stay float32."""
        network = copy.copy(self)
        network._bfloat16 = True
        return network

    @property
    def blocks(self) -> list[SynthesisBlock]:
        """The blocks, coarse to fine."""
        return [getattr(self, f"b{size}") for size in self.resolutions]

    @property
    def layers(self) -> list[SynthesisLayer]:
        """The convolution layers, coarse to fine; each has one noise map."""
        return [layer for block in self.blocks for layer in block.layers]

    def make_noise(self, batch: int, rng: torch.Generator | None = None) -> list[Tensor]:
        """Samples standard normal noise maps (B, 1, H, W), one per layer."""
        device = self.layers[0].noise_const.device
        return [
            torch.randn(batch, 1, layer.resolution, layer.resolution, device=device, generator=rng)
            for layer in self.layers
        ]

    def forward(
        self,
        ws: Tensor,
        noise_mode: str = "const",
        noise: Sequence[Tensor | None] | None = None,
        details: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Synthesizes images.

        Args:
            ws: Style codes (B, L, D).
            noise_mode: "const" uses the stored maps, "random" samples fresh ones, "none" adds none.
            noise: Maps (B or 1, 1, H, W) per layer that replace the mode's; None entries keep it.
            details: Features (B, C, r, r) that are added to those of the block of r pixels, by r; see `models.encoder`.

        Returns:
            Images (B, 3, R, R), about [-1, 1] but not clamped.

        Raises:
            ValueError: If the mode is unknown, or codes or noise have the wrong shape.
        """
        if not self._bfloat16:
            return self._images(ws, noise_mode, noise, details or {})
        with torch.autocast(ws.device.type, torch.bfloat16):
            return self._images(ws, noise_mode, noise, details or {}).float()

    def _images(
        self, ws: Tensor, noise_mode: str, noise: Sequence[Tensor | None] | None, details: Mapping[int, Tensor]
    ) -> Tensor:
        styles, noises = self._by_block(ws, noise_mode, noise)
        small = sum(size < banded.SMALLEST for size in self.resolutions) if banded.pays(ws) else len(self.blocks)
        x, sums = self._run_blocks(styles[:small], noises[:small], details)
        if small < len(self.blocks):
            return banded.synthesize_blocks(self.blocks[small:], x, sums[-1], styles[small:], noises[small:])
        return sums[-1]

    def partial_sums(self, ws: Tensor) -> list[Tensor]:
        """Synthesizes images, with what the colour outputs have added up to at every resolution.

        Returns:
            Colours (B, 3, r, r) for r = 4, 8, …, R, with the stored noise maps. The last are the images; the others
            are not yet pictures, see `losses.side_outputs`. Those at r depend on the coarsest 2 log2(r) − 2 styles.
        """
        return self._run_blocks(*self._by_block(ws, "const", None))[1]

    def _by_block(
        self, ws: Tensor, noise_mode: str, noise: Sequence[Tensor | None] | None
    ) -> tuple[list[Sequence[Tensor]], list[Sequence[Tensor | None]]]:
        """Gives the style codes and the noise maps of every block."""
        maps = self._noise_maps(ws, noise_mode, noise)
        codes = ws.unbind(dim=1)
        # One code per layer of a block and one for its colour, which shares it with the next block's first layer.
        starts = [max(0, 2 * i - 1) for i in range(len(self.blocks))]
        styles: list[Sequence[Tensor]] = [codes[start : 2 * i + 2] for i, start in enumerate(starts)]
        return styles, [maps[start : 2 * i + 1] for i, start in enumerate(starts)]

    def _run_blocks(
        self,
        styles: Sequence[Sequence[Tensor]],
        noises: Sequence[Sequence[Tensor | None]],
        details: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> tuple[Tensor, list[Tensor]]:
        """Synthesizes the first blocks; gives the features of the last of them, and the colour after each."""
        x: Tensor | None = None
        sums: list[Tensor] = []
        kept = self.resolutions[: len(self.blocks) - (self.checkpointed if torch.is_grad_enabled() else 0)]
        for size, block, w, noise in zip(self.resolutions, self.blocks, styles, noises, strict=False):
            inputs = x, sums[-1] if sums else None, w, noise, details.get(size)
            if size in kept:
                x, rgb = block(*inputs)
            else:  # a block has no random numbers of its own, so it computes the same again
                x, rgb = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            sums.append(rgb)
        assert x is not None
        return x, sums

    def _noise_maps(self, ws: Tensor, noise_mode: str, noise: Sequence[Tensor | None] | None) -> list[Tensor | None]:
        if ws.ndim != 3 or ws.shape[1] != self.num_ws or ws.shape[2] != self.w_dim:
            raise ValueError(
                f"Expected style codes (B, {self.num_ws}, {self.w_dim}), got {tuple(ws.shape)}; "
                "repeat a single w by w[:, None].expand(-1, num_ws, -1)."
            )
        maps: list[Tensor | None]
        if noise_mode == "const":
            maps = [layer.noise_const[None, None] for layer in self.layers]
        elif noise_mode == "random":
            maps = list(self.make_noise(ws.shape[0]))
        elif noise_mode == "none":
            maps = [None] * self.num_layers
        else:
            raise ValueError(f"Expected noise_mode to be one of {', '.join(NOISE_MODES)}, got {noise_mode!r}.")
        if noise is not None:
            self._check_noise(noise, ws.shape[0])
            maps = [given if given is not None else own for given, own in zip(noise, maps, strict=True)]
        return maps

    def _check_noise(self, noise: Sequence[Tensor | None], batch: int) -> None:
        if len(noise) != self.num_layers:
            raise ValueError(f"Expected {self.num_layers} noise maps, one per layer, got {len(noise)}.")
        for i, (layer, given) in enumerate(zip(self.layers, noise, strict=True)):
            size = layer.resolution
            if given is None:
                continue
            if given.ndim != 4 or given.shape[1:] != (1, size, size) or given.shape[0] not in (1, batch):
                raise ValueError(
                    f"Expected noise map {i} to be (B or 1, 1, {size}, {size}) with B = {batch}, "
                    f"got {tuple(given.shape)}; `make_noise` makes maps of the right shapes."
                )


class Generator(nn.Module):
    """A StyleGAN2 generator.

    Args:
        resolution: Output size R in pixels, a power of two from 32 to 1024.
        channels: Widths per resolution 4, 8, …, R; None for the official ones.
        z_dim: Width Z of the latent z.
        w_dim: Width D of the latent w.
        mapping_layers: Depth of the mapping network.
        mapping_lr_multiplier: Relative learning rate of the mapping network.
        conv_clamp: Limit of the features' magnitude, None for none; see `SynthesisLayer`.

    Raises:
        ValueError: If the resolution is not supported or the widths do not match it.

    Example:
        >>> generator = Generator(64, channels=(256, 256, 128, 64, 32), z_dim=256, w_dim=256, mapping_layers=4)
        >>> images = generator.synthesis(generator.mapping(torch.randn(2, 256)))  # (2, 3, 64, 64)
    """

    def __init__(
        self,
        resolution: int = 1024,
        channels: Sequence[int] | None = None,
        z_dim: int = 512,
        w_dim: int = 512,
        mapping_layers: int = 8,
        mapping_lr_multiplier: float = 0.01,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        if resolution not in (32, 64, 128, 256, 512, 1024):
            raise ValueError(f"Expected a resolution of 32, 64, 128, 256, 512 or 1024, got {resolution}.")
        channels = tuple(channels) if channels is not None else channels_by_resolution(resolution)
        sizes = int(math.log2(resolution)) - 1
        if len(channels) != sizes:
            raise ValueError(
                f"Expected {sizes} channel widths for {resolution} px (4, 8, …, {resolution}), got {len(channels)}."
            )
        self.resolution = resolution
        self.channels = channels
        self.z_dim = z_dim
        self.w_dim = w_dim
        self.conv_clamp = conv_clamp
        self.synthesis = SynthesisNetwork(resolution, channels, w_dim, conv_clamp)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, w_dim, mapping_layers, self.num_ws, mapping_lr_multiplier)

    @property
    def w_avg(self) -> Tensor:
        """The mean of w (D,), tracked during training."""
        return self.mapping.w_avg

    @property
    def config(self) -> dict[str, int | list[int] | float | None]:
        """The constructor's arguments that make the same generator again; its tensors show all but `conv_clamp`."""
        return {
            "resolution": self.resolution,
            "channels": list(self.channels),
            "z_dim": self.z_dim,
            "w_dim": self.w_dim,
            "mapping_layers": self.mapping.num_layers,
            "conv_clamp": self.conv_clamp,
        }

    def forward(self, z: Tensor, truncation_psi: float = 1.0, noise_mode: str = "const") -> Tensor:
        """Synthesizes images from latents z (B, Z); see `MappingNetwork.forward` and `SynthesisNetwork.forward`."""
        return self.synthesis(self.mapping(z, truncation_psi), noise_mode)
