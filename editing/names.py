"""Names of edits, and which attributes of CelebA they are."""

from __future__ import annotations

from data.labels import ATTRIBUTES

# Edits whose names differ from the attribute's; −1 where the attribute is the opposite.
_SPECIAL: dict[str, tuple[str, int]] = {
    "smile": ("Smiling", 1),
    "beard": ("No_Beard", -1),
    "mouth-open": ("Mouth_Slightly_Open", 1),
    "lipstick": ("Wearing_Lipstick", 1),
    "makeup": ("Heavy_Makeup", 1),
    "earrings": ("Wearing_Earrings", 1),
    "hat": ("Wearing_Hat", 1),
    "necklace": ("Wearing_Necklace", 1),
    "necktie": ("Wearing_Necktie", 1),
    "5-o-clock-shadow": ("5_o_Clock_Shadow", 1),
}
_TAKEN = {attribute for attribute, _ in _SPECIAL.values()}
EDITS: dict[str, tuple[str, int]] = _SPECIAL | {
    attribute.lower().replace("_", "-"): (attribute, 1) for attribute in ATTRIBUTES if attribute not in _TAKEN
}
"""By the name of an edit its attribute, and +1 or −1 for the side of it."""

DEFAULT_EDITS = (
    "smile", "bangs", "black-hair", "blond-hair", "brown-hair", "gray-hair", "eyeglasses", "male", "young", "beard",
    "pale-skin", "mouth-open", "makeup", "wavy-hair",
)  # fmt: skip
"""What `python -m editing fit` makes unless told otherwise."""

_FACE_HAIR = ("5_o_Clock_Shadow", "Goatee", "Mustache", "Sideburns", "No_Beard")
_HAIR_COLOURS = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
_MADE_UP = ("Heavy_Makeup", "Wearing_Lipstick", "Rosy_Cheeks", "Arched_Eyebrows", "Attractive")
SYNONYMS: dict[str, tuple[str, ...]] = {
    # A smile is seen at the mouth and the cheeks; hair has one colour; a beard is five attributes of CelebA.
    "smile": ("Mouth_Slightly_Open", "High_Cheekbones"),
    "mouth-open": ("Smiling", "High_Cheekbones"),
    **{name: _HAIR_COLOURS for name in ("black-hair", "blond-hair", "brown-hair", "gray-hair")},
    "bangs": ("Receding_Hairline",),
    "beard": _FACE_HAIR,
    "male": (*_FACE_HAIR, *_MADE_UP, "Wearing_Earrings", "Wearing_Necktie", "Wearing_Necklace"),
    "makeup": _MADE_UP,
    "young": ("Gray_Hair", "Bags_Under_Eyes", "Double_Chin", "Attractive"),
    "wavy-hair": ("Straight_Hair",),
    "pale-skin": ("Rosy_Cheeks",),
}
"""Attributes that say the same as an edit, or its opposite: an edit may move them, and is not judged by them."""


def attribute_of(name: str) -> tuple[str, int]:
    """Finds CelebA's attribute of an edit such as "smile", and +1, or −1 where the edit is its opposite.

    Raises:
        ValueError: If there is no such edit.
    """
    if name not in EDITS:
        raise ValueError(f"expected an edit among {', '.join(sorted(EDITS))}, got {name!r}")
    return EDITS[name]


def synonyms_of(name: str) -> set[str]:
    """The attributes that say the same as an edit, or its opposite; its own is not among them."""
    return set(SYNONYMS.get(name, ())) - {attribute_of(name)[0]}
