"""The project from elsewhere, through torch.hub; nothing needs to be installed but the libraries named below.

Example:
    >>> import torch
    >>> repository = "path/to/the/checkout"  # or "owner/name" on GitHub, without source="local"
    >>> upsampler = torch.hub.load(repository, "upsampler", source="local")
    >>> samples = upsampler(torch.rand(1, 3, 16, 16) * 2 - 1, k=4)  # samples.images (1, 4, 3, 64, 64)
    >>> generator = torch.hub.load(repository, "generator", "network-snapshot-025000.pkl", source="local")
    >>> images = generator(torch.randn(2, generator.z_dim))  # (2, 3, R, R)
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from models.generator import Generator
    from pipeline import Upsampler

dependencies = ["torch", "numpy", "safetensors", "tqdm", "yaml"]  # and timm for `upsampler`

# torch.hub takes every public callable of this file for an entry point, so classes and functions stay in their modules.
_ROOT = pathlib.Path(__file__).resolve().parent


def _check_packages() -> None:
    """Refuses to mix with another project's packages of the same names, of which Python holds one at a time."""
    for name in ("data", "models", "search", "pipeline"):
        places = list(getattr(sys.modules.get(name), "__path__", [str(_ROOT / name)]))
        if [pathlib.Path(place).resolve() for place in places] != [_ROOT / name]:
            raise ImportError(
                f"Expected the package {name!r} of {_ROOT}, but one from {', '.join(places)} is imported already; load "
                "this project in a process of its own, or before the other."
            )


_check_packages()

# All that is used later is imported now: torch.hub takes the repository off sys.path once it has loaded something.
import models.bundle  # noqa: E402
import models.encoder  # noqa: E402
import models.pretrained  # noqa: E402
import models.propulse  # noqa: E402
import models.psp  # noqa: E402
import pipeline.torch_backend  # noqa: E402, F401


def generator(path_or_name: str = "celeba64", device: torch.device | str = "cpu") -> Generator:
    """Loads a StyleGAN2 generator.

    Args:
        path_or_name: A file of weights in any layout that `models.load_generator` reads; or the name of a bundle in
            bundles/; or that of published weights (`python -m models.checkpoints list`), which are downloaded if they
            are not on this machine. A name goes before a file of the same name; write ./name for that.
        device: Where to put it.

    Returns:
        The generator, in eval mode, without gradients on its parameters.

    Raises:
        FileNotFoundError: If there is no such file, or it cannot be downloaded.
        ValueError: If there is no such name, or the file is not a StyleGAN2 generator.

    Example:
        >>> generator = torch.hub.load("path/to/the/checkout", "generator", source="local")
        >>> images = generator.synthesis(generator.mapping(torch.randn(2, generator.z_dim)))  # (2, 3, R, R)
    """
    return models.load_generator(_find_generator(str(path_or_name)), device)


def upsampler(bundle: str = "celeba64", device: str = "auto") -> Upsampler:
    """Loads a bundle: a generator with the encoder that finds faces for low-resolution pictures.

    Args:
        bundle: The name of a bundle in bundles/, or the path of one.
        device: "auto", "cpu", "cuda", "cuda:1" …, or "mps".

    Returns:
        The upsampler; `upsampler(lr, k)` takes faces (B, 3, s, s) in [-1, 1], see `pipeline.Upsampler`.

    Raises:
        FileNotFoundError: If there is no such bundle.
        ValueError: If the bundle is damaged, or there is no such device.

    Example:
        >>> upsampler = torch.hub.load("path/to/the/checkout", "upsampler", source="local")
        >>> samples = upsampler(torch.rand(1, 3, 16, 16) * 2 - 1, k=4)
        >>> samples.images.shape, samples.ws.shape
        (torch.Size([1, 4, 3, 64, 64]), torch.Size([1, 4, 10, 256]))
    """
    if importlib.util.find_spec("timm") is None:
        raise ImportError("Expected the library timm, which the encoder is made of: pip install timm")
    own = _bundles().get(str(bundle))
    if own is None and not (pathlib.Path(bundle) / "bundle.json").is_file():
        raise FileNotFoundError(
            f"Expected a folder with bundle.json or one of the bundles {', '.join(_bundles())}, got {str(bundle)!r}."
        )
    return pipeline.Upsampler.from_pretrained(own or bundle, device)


def _bundles() -> dict[str, pathlib.Path]:
    return {path.parent.name: path.parent for path in sorted((_ROOT / "bundles").glob("*/bundle.json"))}


def _find_generator(path_or_name: str) -> pathlib.Path:
    """Finds the file that is meant."""
    bundles, cards = _bundles(), models.pretrained.read_cards()
    if path_or_name in bundles:
        return bundles[path_or_name] / models.bundle.GENERATOR
    if path_or_name in cards:
        card = cards[path_or_name]
        print(f"{card.name}: {card.licence}, {card.licence_url}", file=sys.stderr)
        return models.pretrained.fetch(card)[0]
    path = pathlib.Path(path_or_name).expanduser()
    if path.is_file():
        return path
    if (path / "bundle.json").is_file():
        return path / models.bundle.GENERATOR
    names = ", ".join([*bundles, *cards])
    raise FileNotFoundError(f"Expected a file of weights, a bundle, or one of {names}, got {path_or_name!r}.")
