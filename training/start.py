r"""Where a training starts from: weights of a network like its own, or of a generator of half its size, which grows.

A generator grows by one block. The blocks below and the mapping network are taken over, and the new block's colour
output starts at zero, so that the first pictures are the old ones, enlarged.

What a training leaves for another one to start from are two files in float16, generator and discriminators:
    python -m training.start --checkpoint runs/stylegan2_128/checkpoints/last.ckpt --out start
    python train.py fit --config configs/stylegan2_128.yaml --model.init_generator start/generator.safetensors \
        --model.init_discriminator start/discriminator.safetensors --model.freeze_steps 0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from data.console import blame, path_option, run_command
from data.files import check_folder, owned_folder
from models import load_generator
from models.bundle import load_bundle
from models.checkpoints.generators import make_generator, save_generator, to_half, write_safetensors
from models.checkpoints.layouts import Checkpoint
from models.discriminator import Discriminator, PooledFeatureDiscriminator
from models.encoder_base import EncoderBase
from models.generator import Generator
from models.psp import PspVariant
from training.checkpoints import read_checkpoint

FEATURES = "features."  # before the names of the discriminator of frozen features


def start_generator(generator: Generator, path: str) -> bool:
    """Copies the weights of a generator of the same size, or of half of it: then True, for it has grown.

    Raises:
        ValueError: If the file's generator is neither the same nor this one without its last block.
    """
    loaded = load_generator(path)
    own = generator.config
    half = {**own, "resolution": generator.resolution // 2, "channels": list(generator.channels[:-1])}
    if loaded.config not in (own, half):
        raise ValueError(
            f"Expected a generator of shape {own} in {path}, or one without the last block, {half}, got "
            f"{loaded.config}; set channels, z_dim, w_dim and mapping_layers of the recipe accordingly."
        )
    generator.load_state_dict(generator.state_dict() | loaded.state_dict())
    grown = loaded.config != own
    if grown:
        for parameter in (generator.synthesis.blocks[-1].torgb.weight, generator.synthesis.blocks[-1].torgb.bias):
            nn.init.zeros_(parameter)
    return grown


def start_discriminator(
    discriminator: Discriminator, path: str, features: PooledFeatureDiscriminator | None = None
) -> None:
    """Copies the weights of a discriminator of the same shape, and of the one of frozen features where the file has it.

    The file is what `save_start` writes, or another safetensors file of a state dict.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds a discriminator of another shape.
    """
    tensors = load_file(path)
    theirs = _under(FEATURES, tensors)
    _load(discriminator, {name: t for name, t in tensors.items() if not name.startswith(FEATURES)}, path)
    if theirs and features is not None and features.state_dict():
        _load(features, theirs, path)


def save_start(state_dict: Mapping[str, Tensor], folder: str | Path, average: str = "generator_ema") -> None:
    """Writes generator.safetensors and discriminator.safetensors in float16, for another training to start from.

    `average` is "generator_ema", "generator_ema_short", or "generator", the one that is trained.
    """
    folder = Path(folder)
    missing = {"images_seen", f"{average}.mapping.w_avg"} - state_dict.keys()
    if missing:
        raise ValueError(f"Expected a checkpoint of a training of StyleGAN2, found none of {', '.join(missing)} in it.")
    notes = {"images_seen": str(int(state_dict["images_seen"]))}
    checkpoint = Checkpoint("amortized-pulse", _under(f"{average}.", state_dict), None, notes)
    save_generator(make_generator(checkpoint, folder), folder / "generator.safetensors", notes)
    theirs = {FEATURES + name: t for name, t in _under("feature_discriminator.", state_dict).items()}
    own = _under("discriminator.", state_dict)
    write_safetensors(to_half(own | theirs), folder / "discriminator.safetensors", notes)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load(network: nn.Module, tensors: dict[str, Tensor], path: str) -> None:
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    got = {name: tensor.shape for name, tensor in tensors.items()}
    if got != wanted:
        different = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
        raise ValueError(
            f"Expected the weights of the recipe's {type(network).__name__} in {path}, got others: "
            f"{', '.join(different[:3])} differ; set resolution and channels accordingly."
        )
    network.load_state_dict(tensors)


def load_encoder_like(encoder: EncoderBase, path: str) -> EncoderBase:
    """Loads the encoder of a bundle to start from.

    Raises:
        ValueError: If it is of another shape than `encoder`.
    """
    theirs = load_bundle(path).encoder
    if theirs.config != encoder.config:
        raise ValueError(
            f"Expected an encoder with {encoder.config} in {path}, got one with {theirs.config}; start from one for a "
            "generator of the same shape, or from scratch without init_encoder."
        )
    return theirs


def start_from(encoder: EncoderBase, path: str) -> None:
    """Copies the weights of another encoder, of a bundle or, for "psp", of a checkpoint; the latent statistics stay.

    Raises:
        ValueError: If that encoder is of another shape.
    """
    if Path(path).is_file() and isinstance(encoder, PspVariant):
        encoder.load_psp(path)
        return
    theirs = load_encoder_like(encoder, path)
    statistics = {f"latents.{name}": t for name, t in encoder.latents.state_dict().items()}
    encoder.load_state_dict(theirs.state_dict() | statistics)


def start_backbone(encoder: EncoderBase, file: str) -> None:
    """Takes the backbone of a face recognition network, see `PspVariant.load_backbone`."""
    if not isinstance(encoder, PspVariant):
        raise ValueError("Expected the variant 'psp' for init_backbone; leave it out, or train that variant.")
    encoder.load_backbone(file)


def main(args: Sequence[str] | None = None) -> int:
    """Writes what another training can start from; returns the exit status."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m training.start", description=description, epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--checkpoint", type=path_option, required=True, help="of a training of StyleGAN2")
    parser.add_argument("--out", type=path_option, required=True, help="a folder")
    parser.add_argument(
        "--average", default="generator_ema", choices=["generator_ema", "generator_ema_short", "generator"]
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote")
    given = parser.parse_args(args)
    names = ("generator.safetensors", "discriminator.safetensors")
    try:
        check_folder(given.out, given.overwrite, names=names)
    except ValueError as error:
        parser.error(f"--out: {error}")

    def write() -> int:
        with blame("--checkpoint"):
            state_dict = read_checkpoint(given.checkpoint)["state_dict"]
        with owned_folder(given.out, given.overwrite, names=names) as partial:
            save_start(state_dict, partial, given.average)
        return 0

    return run_command("training.start", write)


if __name__ == "__main__":
    sys.exit(main())
