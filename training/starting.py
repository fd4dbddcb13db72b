"""Where the training of an encoder starts from: another encoder, or a backbone that somebody else trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    loaded = load_bundle(path).encoder
    if _lasting(loaded.config) != _lasting(encoder.config):
        raise ValueError(
            f"Expected an encoder with {encoder.config} in {path}, got one with {loaded.config}; start from "
            "one for a generator of the same shape, or from scratch without init_encoder."
        )
    theirs = ("latents.", "feedback.", "posterior.")
    state = {name: t for name, t in loaded.state_dict().items() if not name.startswith(theirs)}
    statistics = {f"latents.{name}": t for name, t in encoder.latents.state_dict().items()}
    encoder.load_state_dict(state | statistics)


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


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what is fitted to a finished encoder, and does not outlive a training: feedback and posterior."""
    fitted = {"feedback", "feedback_hidden", "feedback_small_rank", "posterior"} | (
        set() if config.get("scaled_heads") else {"rank"}
    )
    return {name: value for name, value in config.items() if name not in fitted}
