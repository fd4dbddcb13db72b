"""pSp (Richardson et al. 2021) as an encoder of this project, for comparison and for those who own its weights.

    python -m models.psp_variant psp_celebs_super_resolution.pt --out runs/psp      # a bundle of both its networks
    python evaluate.py --bundle psp=runs/psp --data CelebAMask-HQ.zip --split celebahq --part test

The network of `models.psp_encoder` sees the LR face blown up bilinearly to 256 px, as in pSp's super-resolution, and is
not told its size. Its styles are offsets from the mean latent; for a generator whose styles are not 512 wide, a last
linear layer narrows them. Samples mix the fine styles, l ≥ 7, with those of random faces (pSp, section 4.4).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints import load_generator
from models.checkpoints.layouts import is_named_tensor
from models.checkpoints.unpickler import safe_load
from models.encoder_base import EncoderBase, Encoding, Features
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
        rank: See `EncoderBase`.
        widths: Channels of the stem and of the backbone's four stages, see `models.psp_encoder.PspEncoder`.
        kind: "psp", or "e4e", whose first head speaks for all styles (Tov et al. 2021).
    """

    def __init__(
        self,
        resolution: int,
        num_ws: int,
        w_dim: int,
        rank: int = 0,
        widths: Sequence[int] = WIDTHS,
        kind: str = "psp",
    ) -> None:
        super().__init__(resolution, num_ws, w_dim, SIZE, w_dim, rank)
        self.config |= {"variant": "psp"} | ({"widths": list(widths)} if tuple(widths) != WIDTHS else {})
        self.config |= {"kind": kind} if kind != "psp" else {}
        self.network = PspEncoder(num_ws, kind, widths)
        self.network.latent_avg = None  # type: ignore[assignment]  # the generator's own, in `latents`, takes its place
        self.narrow = EqualLinear(self.network.w_dim, w_dim) if self.network.w_dim != w_dim else nn.Identity()

    def on_canvas(self, lr: Tensor) -> Tensor:
        """Brings LR faces (B, 3, s, s) of any one size to 256 px, bilinearly as torchvision's Resize does."""
        return F.interpolate(lr, size=(SIZE, SIZE), mode="bilinear", antialias=True)

    def read(self, canvas: Tensor, size: Tensor, sigma: Tensor) -> Features:
        """Looks at faces of 256 px (B, 3, 256, 256).

        Args:
            canvas: LR faces as `on_canvas` gives them.
            size: Not looked at.
            sigma: Not looked at.

        Returns:
            Levels of the pyramid (B, C, 16, 16), (B, C, 32, 32) and (B, C, 64, 64) as features for the styles.
        """
        levels = self.network.pyramid(canvas.contiguous(memory_format=torch.channels_last))
        return Features([levels[stride] for stride in sorted(levels, reverse=True)], [], size[:, None])

    def point(self, features: Features) -> Tensor:
        """Maps the levels of `read` to codes (B, L, D)."""
        coarse, medium, fine = features.styles
        offsets = self.network.offsets({16: coarse, 8: medium, 4: fine})
        return self.latents.w_avg + self.narrow(offsets).float()

    def sample(self, features: Features, noise: Tensor) -> Encoding:
        """Mixes the fine styles with those of random faces; noise (B, k, D)."""
        return self.mixed_styles(self.point(features), noise, FIRST_FINE)

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
        """Takes all weights from a checkpoint of pSp or e4e; its codes stay exactly its codes.

        Args:
            path: The `.pt` file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no encoder of this shape.
        """
        loaded = load_psp_encoder(path)
        found = {"kind": loaded.kind, "num_ws": loaded.num_ws, "w_dim": loaded.w_dim}
        expected = {"kind": self.network.kind, "num_ws": self.num_ws, "w_dim": self.w_dim}
        if found != expected or self.network.w_dim != self.w_dim:
            raise ValueError(f"{path}: expected an encoder with {expected}, found one with {found}.")
        state = loaded.state_dict()
        average = state.pop("latent_avg")  # (L, D); whatever it differs from ours by goes into the heads
        self.network.load_state_dict(state)
        lacking = average - self.latents.w_avg
        if self.network.kind == "e4e":  # the others add to the first
            lacking[1:] -= lacking[0].clone()
        for style, missing in zip(self.network.styles, lacking, strict=True):
            style.linear.bias += missing  # type: ignore[operator, union-attr]


def bundle_of(path: Path, out: Path) -> None:
    """Makes a bundle of a checkpoint of pSp or e4e, with the generator in it.

    Args:
        path: The `.pt` file.
        out: Folder of the bundle.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold both networks.
    """
    from models.bundle import save_bundle  # late: it knows all encoders

    generator, theirs = load_generator(path), load_psp_encoder(path)
    shape = generator.resolution, generator.num_ws, generator.w_dim
    encoder = PspVariant(*shape, widths=theirs.widths, kind=theirs.kind)
    encoder.latents.fit(generator)
    encoder.load_psp(path)
    about = {"licence": "That of the checkpoint's authors", "training_data": "See the checkpoint's authors"}
    save_bundle(out, generator, encoder, {"name": path.stem, **about})


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 0, or 1 with a message.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="checkpoint of pSp or e4e, with the generator in it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the bundle")
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"--out: {args.out} exists; name another folder")
    try:
        bundle_of(args.file, args.out)
    except (ValueError, OSError) as error:
        print(f"models.psp_variant: {error}", file=sys.stderr)
        return 1
    print(f"{args.out} is a bundle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
