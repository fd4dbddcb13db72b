"""Where the training of an encoder starts from: another encoder, or a backbone that somebody else trained."""

from __future__ import annotations

from pathlib import Path

from models.bundle import load_bundle
from models.encoder_base import EncoderBase
from models.psp_variant import PspVariant


def start_from(encoder: EncoderBase, path: str) -> None:
    """Copies the weights of another encoder; the latent statistics stay.

    Args:
        encoder: Takes the weights.
        path: A bundle; or, for the variant "psp", a checkpoint of pSp.

    Raises:
        ValueError: If that encoder is of another shape.
    """
    if Path(path).is_file() and isinstance(encoder, PspVariant):
        encoder.load_psp(path)
        return
    theirs = load_bundle(path).encoder
    if theirs.config != encoder.config:
        raise ValueError(
            f"Expected an encoder with {encoder.config} in {path}, got one with {theirs.config}; start from one for a "
            "generator of the same shape, or from scratch without init_encoder."
        )
    statistics = {f"latents.{name}": t for name, t in encoder.latents.state_dict().items()}
    encoder.load_state_dict(theirs.state_dict() | statistics)


def start_backbone(encoder: EncoderBase, file: str) -> None:
    """Takes the backbone of a face recognition network, see `PspVariant.load_backbone`.

    Args:
        encoder: Takes the weights.
        file: A file, or its name.

    Raises:
        ValueError: If the encoder has another backbone.
    """
    if not isinstance(encoder, PspVariant):
        raise ValueError("Expected the variant 'psp' for init_backbone; leave it out, or train that variant.")
    encoder.load_backbone(file)
