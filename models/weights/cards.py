"""Cards of other people's weights: where they are published, on which terms, and whether they are on this machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from urllib.error import HTTPError

import yaml

from models.pretrained import VARIABLE, weight_folders
from models.weights.download import CutError, download
from models.weights.safetensors_files import sha256_of

CARDS = Path(__file__).resolve().parent.parent / "cards.yaml"


@dataclass(frozen=True)
class Card:
    """Where a file of weights comes from.

    Attributes:
        name: Short name, such as "ffhq256".
        file: Its name on this machine.
        url: Where it is downloaded from; None if only by hand.
        source: The page that names the address or leads to the file.
        sha256: What the file should have, 64 hexadecimal digits; None if its publisher does not say.
        resolution: Size of the pictures in pixels.
        layout: Whose layout the file has.
        licence: On which terms, in short.
        licence_url: The whole text.
        note: What it draws, and what it was trained on.
    """

    name: str
    file: str
    url: str | None
    source: str
    sha256: str | None
    resolution: int
    layout: str
    licence: str
    licence_url: str
    note: str


def read_cards(path: Path | None = None) -> dict[str, Card]:
    """Reads the cards.

    Args:
        path: A YAML file of them; that of the project if None.

    Returns:
        The cards by name, in the order of the file.

    Raises:
        ValueError: If a card lacks a field, or has one too many.
    """
    path = path or CARDS
    cards = {}
    for name, content in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        wanted = {field.name for field in fields(Card)} - {"name"}
        if content.keys() != wanted:
            raise ValueError(f"{path}: expected the card {name} to have {sorted(wanted)}, got {sorted(content)}.")
        cards[name] = Card(name=name, **content)
    return cards


def find_card(name: str) -> Card:
    """Finds a card by its name.

    Args:
        name: Its name.

    Returns:
        The card.

    Raises:
        ValueError: If there is none; names those that there are.
    """
    cards = read_cards()
    if name not in cards:
        raise ValueError(f"Expected one of {', '.join(cards)}, got {name!r}; see `python -m models.weights list`.")
    return cards[name]


def find_file(card: Card) -> Path | None:
    """Looks for the file of a card in the folders of weights.

    Args:
        card: The card.

    Returns:
        Its path, None if it is nowhere.
    """
    places = [folder / card.file for folder in weight_folders()]
    return next((path for path in places if path.is_file()), None)


def card_of(path: Path, sha256: str, resolution: int) -> Card | None:
    """Recognises a file by its sha256, or, where its card has none, by its name and resolution.

    Args:
        path: The file.
        sha256: Its sha256.
        resolution: Size of the pictures that it draws, in pixels.

    Returns:
        Its card, None if there is none.
    """
    cards = read_cards().values()
    for card in cards:
        if card.sha256 == sha256:
            return card
    return next((c for c in cards if c.sha256 is None and (c.file, c.resolution) == (path.name, resolution)), None)


def fetch(card: Card, folder: Path | None = None) -> tuple[Path, str]:
    """Gives the file of a card; downloads it if it is not there.

    Args:
        card: The card.
        folder: Where it is looked for and put; if None, it is looked for in all folders of weights, and put into the
            first.

    Returns:
        Its path and its sha256.

    Raises:
        FileNotFoundError: If it cannot be downloaded; says which file to put where.
        CutError: If a download was cut; the next call goes on with it.
        ValueError: If the file has another sha256 than the card says.
    """
    path = (folder or weight_folders()[0]) / card.file
    there = find_file(card) if folder is None else path if path.is_file() else None
    if there is not None:
        found = sha256_of(there)
        if card.sha256 not in (None, found):
            raise ValueError(
                f"{there}: expected {card.name} with the sha256 {card.sha256}, got {found}; move the file away, and "
                f"fetch {card.name} again."
            )
        return there, found
    if card.url is None:
        raise FileNotFoundError(f"{card.name}: there is no address to download it from. {by_hand(card, path)}")
    try:
        return path, download(card.url, path, card.sha256)
    except CutError:
        raise
    except HTTPError as error:
        raise FileNotFoundError(f"{card.name}: the server answers {error}. {by_hand(card, path)}") from error
    except OSError as error:  # no network, no such host, no room on the disk
        reason = getattr(error, "reason", error)
        raise FileNotFoundError(f"{card.name}: the download failed ({reason}). {by_hand(card, path)}") from error


def by_hand(card: Card, path: Path) -> str:
    """Says how to do without a download.

    Args:
        card: The card.
        path: Where the file belongs.

    Returns:
        A sentence for messages.
    """
    origin = f"{card.url} (see {card.source})" if card.url else card.source
    return (
        f"Get it by hand from {origin}, and put it at {path}, or under the name {card.file} into a folder named by "
        f"${VARIABLE}."
    )
