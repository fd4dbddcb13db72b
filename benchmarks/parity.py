"""Measures how far our generator is from the reference implementations, given the same weights.

Random generators of the reference code, with random noise strengths, biases and mean latents too, are saved in its own
way, read with `load_generator`, and both get the same latents at truncation 0.7 with stored noise, in float32 on the
CPU. The references run with their own plain PyTorch operations in place of CUDA's. Exit status 1 if a pair differs by
more than 1e-3 anywhere.

Examples:
    git clone https://github.com/rosinality/stylegan2-pytorch
    git clone https://github.com/NVlabs/stylegan2-ada-pytorch
    git clone https://github.com/NVlabs/stylegan3
    python benchmarks/parity.py --rosinality stylegan2-pytorch --nvidia stylegan2-ada-pytorch stylegan3
"""

from __future__ import annotations

import argparse
import itertools
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from packaging.version import Version
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.references import nvidia_networks, rosinality_module
from models.checkpoints import load_generator

TRUNCATION, TOLERANCE = 0.7, 1e-3
CLAMP = 2.0  # low enough to be reached by some features of random networks; published networks have 256
Case = tuple[int, int, int]  # resolution, channel multiplier, mapping depth
Generate = Callable[[Tensor], Tensor]  # z (B, 512) -> images (B, 3, R, R)


@torch.no_grad()
def randomise(network: nn.Module) -> None:
    """Gives random values to what starts at zero or one, so that no tensor may be left out or mixed up unseen."""
    for name, parameter in network.named_parameters():
        if name.endswith((".noise.weight", "noise_strength")):
            parameter.normal_(std=0.2)
        elif name.endswith("bias"):
            # Mapping networks multiply their biases by 0.01.
            parameter.add_(torch.randn_like(parameter), alpha=10.0 if name.startswith(("style.", "mapping.")) else 0.2)


def rosinality_pair(module: ModuleType, case: Case, path: Path) -> tuple[Generate, Path]:
    """Makes a generator of rosinality's code and saves it next to `path`; gives it as a function, and the file."""
    resolution, multiplier, depth = case
    network = module.Generator(resolution, 512, depth, channel_multiplier=multiplier).eval()
    randomise(network)
    average = torch.randn(512) * 0.3
    path = path.with_suffix(".pt")
    torch.save({"g_ema": network.state_dict(), "latent_avg": average}, path)

    def generate(z: Tensor) -> Tensor:
        return network([z], truncation=TRUNCATION, truncation_latent=average, randomize_noise=False)[0]

    return generate, path


def nvidia_pair(module: ModuleType, case: Case, path: Path) -> tuple[Generate, Path]:
    """Makes a generator of NVIDIA's code and pickles it; as `rosinality_pair`."""
    resolution, multiplier, depth = case
    shape = {"channel_base": 16384 * multiplier, "channel_max": 512, "num_fp16_res": 4, "conv_clamp": CLAMP}
    synthesis = {"synthesis_kwargs": shape} if module.__name__ == "training.networks" else shape
    network = module.Generator(512, 0, 512, resolution, 3, mapping_kwargs={"num_layers": depth}, **synthesis)
    network = network.eval().requires_grad_(False)
    randomise(network)
    network.mapping.w_avg.normal_(std=0.3)
    path = path.with_suffix(".pkl")
    with open(path, "wb") as file:
        pickle.dump({"G": None, "D": None, "G_ema": network, "training_set_kwargs": None, "augment_pipe": None}, file)

    def generate(z: Tensor) -> Tensor:
        return network(z, None, truncation_psi=TRUNCATION, noise_mode="const", force_fp32=True)

    return generate, path


@torch.no_grad()
def difference(generate: Generate, path: Path, seed: int) -> tuple[float, float]:
    """Compares the pictures of a reference with ours: the largest difference, and the reference's largest value."""
    generator = load_generator(path)
    count = 1 if generator.resolution == 1024 else 2
    z = torch.randn(count, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    reference = generate(z)
    ours = generator(z, truncation_psi=TRUNCATION, noise_mode="const")
    return float((ours - reference).abs().max()), float(reference.abs().max())


def rows(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Case, float, float]]:
    """Measures all cases of all references; `folder` holds the files of weights, each until it is read."""
    stand_in = ModuleType("pkg_resources")  # stylegan3 asks it for one function, and today's setuptools is without it
    stand_in.__dict__["parse_version"] = Version
    sys.modules.setdefault("pkg_resources", stand_in)
    references = [("rosinality", rosinality_module, rosinality_pair, arguments.rosinality)] * bool(arguments.rosinality)
    references += [(Path(f).resolve().name, nvidia_networks, nvidia_pair, f) for f in arguments.nvidia]
    for name, load, make, checkout in references:
        module = load(Path(checkout).resolve())
        for case in itertools.product(arguments.resolutions, (1, 2), (2, 8)):
            torch.manual_seed(arguments.seed)
            generate, path = make(module, case, folder / "network")
            yield name, case, *difference(generate, path, arguments.seed)
            path.unlink()


def main(args: list[str] | None = None) -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rosinality", metavar="DIR", help="checkout of rosinality/stylegan2-pytorch")
    parser.add_argument(
        "--nvidia", metavar="DIR", nargs="+", default=[], help="checkouts of stylegan2-ada-pytorch or stylegan3"
    )
    parser.add_argument("--resolutions", type=int, nargs="+", default=[32, 256, 1024])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(args)
    if not (arguments.rosinality or arguments.nvidia):
        parser.error(
            "Expected a checkout of a reference to compare with; clone one or all of "
            "https://github.com/rosinality/stylegan2-pytorch (--rosinality), "
            "https://github.com/NVlabs/stylegan2-ada-pytorch and https://github.com/NVlabs/stylegan3 (--nvidia)."
        )
    for folder, file in [(arguments.rosinality, "model.py"), *((f, "training") for f in arguments.nvidia)]:
        if folder and not (Path(folder) / file).exists():
            parser.error(f"Expected a checkout with {file} in it, found none in {folder}.")
    print("| reference | resolution | multiplier | mapping layers | largest difference | largest value |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, (resolution, multiplier, depth), apart, value in rows(arguments, Path(folder)):
            print(f"| {name} | {resolution} | {multiplier} | {depth} | {apart:.1e} | {value:.2f} |", flush=True)
            worst = max(worst, apart)
    if not worst <= TOLERANCE:
        sys.exit(f"Differences of up to {worst:.1e} exceed {TOLERANCE}.")


if __name__ == "__main__":
    main()
