"""pSp (Richardson et al. 2021) as an encoder of this project, for comparison and for those who own its weights.

The network of `models.psp_encoder` sees the LR face blown up bilinearly to 256 px, as in pSp's super-resolution, and is
not told its size. Its styles are offsets from the mean latent; for a generator whose styles are not 512 wide, a last
linear layer narrows them. Further candidates mix the fine styles with those of random faces:

    w_l = (1 − s_l) best_l + s_l w'_l  for the styles l ≥ 7,

where s_l, the `spread`, is pSp's `mix_alpha`; 1, a plain exchange, until it is calibrated (`training.spread`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints.layouts import is_named_tensor
from models.checkpoints.unpickler import safe_load
from models.encoder_base import EncoderBase
from models.layers import EqualLinear
from models.pretrained import find_weights
from models.psp_encoder import FIRST_FINE, SIZE, WIDTHS, PspEncoder, load_psp_encoder

BACKBONE = "model_ir_se50.pth"
BACKBONE_SOURCE = (
    "IR-SE50 trained for face recognition (github.com/TreB1eN/InsightFace_Pytorch); the README of "
    "github.com/eladrich/pixel2style2pixel links to it"
)


class PspVariant(EncoderBase):
    """The encoder of pSp, called like ours.

    Args:
        resolution: Size R of the generator's faces in pixels.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        feedback: See `EncoderBase`.
        rank: See `EncoderBase`.
        widths: Channels of the stem and of the backbone's four stages, see `models.psp_encoder.PspEncoder`.
    """

    def __init__(
        self,
        resolution: int,
        num_ws: int,
        w_dim: int,
        feedback: int = 0,
        rank: int = 0,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        super().__init__(resolution, num_ws, w_dim, SIZE, feedback, rank)
        options = {"feedback": feedback, "rank": rank, "widths": list(widths) if tuple(widths) != WIDTHS else None}
        self.config |= {"variant": "psp", **{name: value for name, value in options.items() if value}}
        self.network = PspEncoder(num_ws, "psp", widths)
        self.network.latent_avg = None  # type: ignore[assignment]  # the generator's own, in `latents`, takes its place
        self.narrow = EqualLinear(self.network.w_dim, w_dim) if self.network.w_dim != w_dim else nn.Identity()
        self.spread[:, FIRST_FINE:] = 1.0

    def on_canvas(self, lr: Tensor) -> Tensor:
        """Brings LR faces (B, 3, s, s) of any one size to 256 px, bilinearly as torchvision's Resize does."""
        return F.interpolate(lr, size=(SIZE, SIZE), mode="bilinear", antialias=True)

    def read(self, canvas: Tensor, size: Tensor) -> list[Tensor]:
        """Looks at faces of 256 px (B, 3, 256, 256); gives the coarse, medium and fine level of the pyramid.

        Args:
            canvas: LR faces as `on_canvas` gives them.
            size: Not looked at.

        Returns:
            Levels (B, C, 16, 16), (B, C, 32, 32) and (B, C, 64, 64).
        """
        levels = self.network.pyramid(canvas.contiguous(memory_format=torch.channels_last))
        return [levels[stride] for stride in sorted(levels, reverse=True)]

    def codes(self, features: list[Tensor]) -> Tensor:
        """Maps the levels of `read` to the best guess (B, L, D)."""
        coarse, medium, fine = features
        offsets = self.network.offsets({16: coarse, 8: medium, 4: fine})
        return self.latents.w_avg + self.narrow(offsets).float()

    def moves(self, features: list[Tensor], best: Tensor, size: Tensor, noise: Tensor) -> Tensor:
        """How candidates differ from the best guess where the spread is 1: their fine styles are a random face's.

        Args:
            features: Not looked at.
            best: Best guess (B, L, D).
            size: Not looked at.
            noise: Standard normal (B, n, D).

        Returns:
            Moves (B, n, L, D), 0 for the coarse and medium styles.
        """
        fine = torch.arange(self.num_ws, device=best.device) >= FIRST_FINE  # (L,)
        return fine[:, None] * (self.latents.sample(noise)[:, :, None] - best[:, None])

    # ---------------------------------------------------------------- weights of others

    @torch.no_grad()
    def load_backbone(self, file: str | Path = BACKBONE) -> None:
        """Takes the backbone from a face recognition network, as pSp's training does; the heads stay as they are.

        Args:
            file: A file, or the name of one that `models.pretrained.find_weights` finds.

        Raises:
            FileNotFoundError: If there is no such file; says which file to put where.
            ValueError: If it holds another network.
        """
        path = Path(file) if Path(file).is_file() else find_weights(str(file), source=BACKBONE_SOURCE)
        content = safe_load(path)
        given = content if isinstance(content, dict) else {}
        tensors = {n: t for n, t in given.items() if is_named_tensor(n, t)}
        wanted = {n: t for n, t in self.network.state_dict().items() if n.startswith(("input_layer.", "body."))}
        wrong = sorted(n for n, t in wanted.items() if n not in tensors or tensors[n].shape != t.shape)
        if wrong:
            raise ValueError(f"{path}: expected the tensors of an IR-SE50 network; missing or misshaped: {wrong[:10]}.")
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def load_psp(self, path: str | Path) -> None:
        """Takes all weights from a checkpoint of pSp; its codes stay exactly its codes.

        Args:
            path: The `.pt` file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no encoder of this shape.
        """
        loaded = load_psp_encoder(path)
        found = {"kind": loaded.kind, "num_ws": loaded.num_ws, "w_dim": loaded.w_dim}
        expected = {"kind": "psp", "num_ws": self.num_ws, "w_dim": self.w_dim}
        if found != expected or self.network.w_dim != self.w_dim:
            raise ValueError(f"{path}: expected a pSp encoder with {expected}, found one with {found}.")
        state = loaded.state_dict()
        average = state.pop("latent_avg")  # (L, D); whatever it differs from ours by goes into the heads
        self.network.load_state_dict(state)
        for style, missing in zip(self.network.styles, average - self.latents.w_avg, strict=True):
            style.linear.bias += missing  # type: ignore[operator, union-attr]
