"""Finds the weights of other people's networks: on this machine first, then where they are published.

Generators that others publish have cards (`cards.yaml`): where they are, on which terms, and what they make.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml
from torch import Tensor

from data.files import ROOT, sha256_of
from data.signatures import describe_file

VARIABLE = "AMORTIZED_PULSE_WEIGHTS"
CARDS = Path(__file__).with_name("cards.yaml")


@dataclass(frozen=True)
class Card:
    """Where a published generator comes from."""

    name: str  # such as "ffhq256"
    file: str  # its name on this machine
    url: str | None  # where it is downloaded from; None if only by hand
    source: str  # the page that names the address or leads to the file
    sha256: str | None  # 64 hexadecimal digits; None if its publisher does not say
    resolution: int  # size of the pictures in pixels
    layout: str
    licence: str  # on which terms, in short
    licence_url: str
    note: str  # what it generates, and what it was trained on


def weight_folders() -> list[Path]:
    """Lists the folders that are searched, in order.

    $AMORTIZED_PULSE_WEIGHTS if set, torch.hub's checkpoints, `weights/` in the repository, and the folders of a
    `shared/` directory next to it.
    """
    folders = [Path(os.environ[VARIABLE]).expanduser()] if os.environ.get(VARIABLE) else []
    shared = ROOT.parent / "shared"
    return [
        *folders,
        Path(torch.hub.get_dir()) / "checkpoints",
        ROOT / "weights",
        shared / "weights",
        shared / "torch_home" / "hub" / "checkpoints",
    ]


def find_weights(*names: str, url: str | None = None, source: str = "") -> Path:
    """Finds a file of weights, and downloads it where that is possible.

    A download whose name carries the first digits of its SHA-256 ("name-0123abcd.pth", torch.hub's convention) is
    checked against them. A file that is found may have been saved anew; see `check_tensors`.

    Args:
        names: File names, such as "mobilefacenet_y1.pt": those that serve alike, the most welcome first.
        url: Where the last of them is downloaded from if no folder has any; None if it has no stable address.
        source: Where the weights come from, in words, for the error message.

    Raises:
        FileNotFoundError: If it is nowhere and cannot be downloaded; says which file to put where.
        ValueError: If a download is another file than expected.
    """
    folders = weight_folders()
    for name in names:
        for folder in folders:
            path = folder / name
            if path.is_file():
                return path
    origin = "; ".join(part for part in (source, url) if part) or "no download address is known"
    help_text = (
        f"Expected the weights {' or '.join(repr(name) for name in names)}, found none in "
        f"{', '.join(map(str, folders))}. Put the file at {' or '.join(str(folders[0] / name) for name in names)}, or "
        f"into a folder of your own named by ${VARIABLE}. It comes from: {origin}."
    )
    if url is None:
        raise FileNotFoundError(help_text)
    digits = re.search(r"-([0-9a-f]{8,})\.", names[-1])
    try:
        return download(url, folders[0] / names[-1], digits[1] if digits else None)
    except OSError as error:
        raise FileNotFoundError(f"{help_text} ({error})") from error


def download(url: str, path: Path, sha256: str | None = None) -> Path:
    """Downloads a file by torch.hub; it appears under its name only once it is complete.

    Raises:
        OSError: If the server cannot be reached, or refuses.
        ValueError: If the file does not have the first digits of SHA-256 that are given, or is a web page; nothing is
            kept then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
    except RuntimeError as error:
        raise ValueError(
            f"{url}: expected a file with the SHA-256 {sha256}, but what came has another ({error}); nothing was kept. "
            "Try again, or fetch the file by hand and compare."
        ) from error
    if what := describe_file(path):
        path.unlink()
        raise ValueError(f"{url}: expected weights, got {what}; nothing was kept.")
    return path


def read_cards(path: Path | None = None) -> dict[str, Card]:
    """Reads the cards of published generators by name, in the order of the file; ValueError if a field is wrong."""
    path = path or CARDS
    cards = {}
    for name, content in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        wanted = {field.name for field in fields(Card)} - {"name"}
        if content.keys() != wanted:
            raise ValueError(f"{path}: expected the card {name} to have {sorted(wanted)}, got {sorted(content)}.")
        cards[name] = Card(name=name, **content)
    return cards


def find_card(name: str) -> Card:
    """Finds a card by its name; ValueError if there is none."""
    cards = read_cards()
    if name not in cards:
        raise ValueError(f"Expected one of {', '.join(cards)}, got {name!r}; see `python -m models.checkpoints list`.")
    return cards[name]


def card_of(path: Path, sha256: str, resolution: int) -> Card | None:
    """Recognises a file by its sha256, or, where its card has none, by its name and resolution; None for no card."""
    cards = list(read_cards().values())
    by_hash = [card for card in cards if card.sha256 == sha256]
    by_name = [c for c in cards if c.sha256 is None and (c.file, c.resolution) == (path.name, resolution)]
    return next(iter(by_hash + by_name), None)


def fetch(card: Card, folder: Path | None = None) -> tuple[Path, str]:
    """Gives path and sha256 of the file of a card; downloads it if it is not there.

    Args:
        card: The card.
        folder: Where it is looked for and put; if None, it is looked for in all folders of weights, and put into the
            first.

    Raises:
        FileNotFoundError: If it cannot be downloaded; says which file to put where.
        ValueError: If the file has another sha256 than the card says.
    """
    path = (folder or weight_folders()[0]) / card.file
    places = [place / card.file for place in ([folder] if folder else weight_folders())]
    there = next((place for place in places if place.is_file()), None)
    by_hand = (
        f"Get it by hand from {card.url or card.source} (see {card.source}), and put it at {path}, or under the name "
        f"{card.file} into a folder named by ${VARIABLE}."
    )
    if there is None and card.url is None:
        raise FileNotFoundError(f"{card.name}: there is no address to download it from. {by_hand}")
    try:
        found = there or download(card.url or "", path, card.sha256)
    except OSError as error:  # no network, no such host, no room on the disk, or the server refuses
        raise FileNotFoundError(f"{card.name}: the download failed ({error}). {by_hand}") from error
    digest = sha256_of(found)
    if card.sha256 not in (None, digest):
        raise ValueError(
            f"{found}: expected {card.name} with the sha256 {card.sha256}, got {digest}; move the file away, and fetch "
            f"{card.name} again."
        )
    return found, digest


def check_tensors(tensors: Mapping[str, Tensor], expected: str, path: Path | str, what: str) -> None:
    """Raises ValueError for tensors whose `tensors_sha256` is not the expected one, whatever file they came in."""
    found = tensors_sha256(tensors)
    if found != expected:
        raise ValueError(
            f"Expected {path} to hold {what} (SHA-256 over its tensors {expected}), got {found}: the file is damaged "
            "or another version. Delete or replace it."
        )


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Computes a checksum of tensors that does not depend on the file format they are kept in.

    The SHA-256 over name, number type, shape and bytes of each tensor, in the order of the names. The step counters
    of batch normalisation (`num_batches_tracked`) are left out: old files lack them, and evaluation never reads them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
