"""What a file of weights says about a generator, in one form for all layouts."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

FORMATS = (
    "Supported are StyleGAN2 generators in the project's own .safetensors, in NVIDIA's .pkl (StyleGAN2-ADA-PyTorch and "
    "StyleGAN3 repositories), and in .pt or .pth files of rosinality, BasicSR/GFPGAN, pSp, e4e, or with StyleGAN2-ADA "
    "names under 'G_ema'."
)


@dataclass
class Checkpoint:
    """A generator as a file holds it.

    Attributes:
        layout: Whose layout the file has, in words, such as "rosinality".
        tensors: Tensors by their StyleGAN2-ADA names (`mapping.fc0.weight`, `synthesis.b4.conv1.weight`, …), without
            filters, in the file's number types. `mapping.w_avg` is missing if the file has no mean latent.
        conv_clamp: Limit of the features' magnitude, None for none; not to be seen in the tensors.
        notes: What else the file says about itself, such as name and licence.
    """

    layout: str
    tensors: dict[str, Tensor]
    conv_clamp: float | None = None
    notes: dict[str, str] = field(default_factory=dict)
