"""Recognises networks that are not read, so that an error can say what a file holds and why that does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable

_STRANGERS = {
    r"synthesis\.(input\.|L\d+_\d+_\d+\.)": (
        "a StyleGAN3 generator; its layers are other ones, and only StyleGAN2 is read"
    ),
    r"mapping\.embed\.": "a conditional StyleGAN2, which needs class labels; only unconditional ones are read",
    r"(generator\.)?progression\.\d+\.|.*ToRGB_lod|g_synthesis\.|g_mapping\.": (
        "a StyleGAN1 generator; it normalises its features instead of its weights, and only StyleGAN2 is read"
    ),
    r".*\.iwt\.": "a SWAGAN generator, which draws wavelets; only StyleGAN2 is read",
    r"style_conv(1|s\.\d+)\.bias$": (
        "the 'clean' variant of BasicSR's StyleGAN2 (StyleGAN2GeneratorClean, GFPGANv1Clean, GFPGAN from version 1.2 "
        "on), which resamples bilinearly instead of with the filter [1, 3, 3, 1] and so draws other pictures; "
        "expected the original one, as in GFPGANv1.pth"
    ),
    r"final_linear\.|conv_body\.|b\d+\.fromrgb\.": (
        "a discriminator, which judges pictures and draws none; expected a generator"
    ),
}


def name_of_stranger(names: Iterable[str]) -> str | None:
    """Says what network has such tensors, if it is a known one that is not read.

    Args:
        names: The names of the tensors of one network.

    Returns:
        What it is and why it is not read, to follow "… is"; None if nothing is known against it.
    """
    names = list(names)
    for pattern, what in _STRANGERS.items():
        if any(re.match(pattern, name) for name in names):
            return what
    return None
