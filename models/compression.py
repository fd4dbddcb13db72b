"""Makes a trained encoder smaller: its widest linear maps keep only their largest singular values.

    W ≈ U_r S_r V_rᵀ, two narrow layers for a wide one

The style heads, and the two last layers of the feedback network, which are one linear map. Nothing is trained.

Examples:
    python -m models.compression --bundle runs/posterior_64/bundle --out runs/small
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.bundle import load_bundle, save_bundle
from models.bundle_info import notes_of
from models.encoder import Encoder, StyleHead
from models.feedback import Feedback


def truncate(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Splits a matrix into the best two of a rank.

    Args:
        weight: Matrix (m, n).
        rank: r, from 1.

    Returns:
        A (m, r) and B (r, n) with A B ≈ W, of equal scale; zeros where r is more than there is.
    """
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root, missing = s[:rank].sqrt(), max(0, rank - len(s))
    a, b = u[:, :rank] * root, root[:, None] * v[:rank]
    return nn.functional.pad(a, (0, missing)).to(weight), nn.functional.pad(b, (0, 0, 0, missing)).to(weight)


@torch.no_grad()
def compress(encoder: Encoder, head_rank: int, feedback_hidden: int) -> Encoder:
    """Makes a smaller encoder that computes nearly the same.

    Args:
        encoder: Trained, with full heads.
        head_rank: Width of the heads' bottleneck.
        feedback_hidden: Width of the feedback's last layer but one, at most what it is now; 0 keeps it.

    Returns:
        The smaller encoder, in eval mode.

    Raises:
        ValueError: If a rank is out of range, or the heads have a bottleneck already.
    """
    now = encoder.feedback.hidden.out_features if encoder.feedback is not None else 0
    if head_rank < 1 or not 0 <= feedback_hidden <= now or "head_rank" in encoder.config:
        raise ValueError(
            f"Expected a head rank from 1, a feedback width from 0 to {now}, and an encoder with full heads, got "
            f"{head_rank}, {feedback_hidden} and {encoder.config}."
        )
    config = {**encoder.config, "head_rank": head_rank}
    if feedback_hidden:
        config["feedback_hidden"] = feedback_hidden
    small = Encoder(**config)
    state = {
        n: t for n, t in encoder.state_dict().items() if n in (own := small.state_dict()) and own[n].shape == t.shape
    }
    small.load_state_dict(state, strict=False)
    for old, new in zip(encoder.heads, small.heads, strict=True):
        assert isinstance(old, StyleHead) and isinstance(new, StyleHead) and isinstance(new.linear, nn.Sequential)
        full, first, second = old.linear, *new.linear
        assert isinstance(full, nn.Linear) and isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        wide, narrow = truncate(full.weight, head_rank)
        first.weight.copy_(narrow)
        second.weight.copy_(wide)
        second.bias.copy_(full.bias)
    if feedback_hidden and encoder.feedback is not None and small.feedback is not None:
        _compress_feedback(encoder.feedback, small.feedback)
    return small.eval().requires_grad_(False)


def _compress_feedback(old: Feedback, new: Feedback) -> None:
    a, b = truncate(old.out.weight @ old.hidden.weight, new.hidden.out_features)
    new.out.weight.copy_(a)
    new.hidden.weight.copy_(b)
    new.hidden.bias.zero_()
    new.out.bias.copy_(old.out.weight @ old.hidden.bias + old.out.bias)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Command line without the program's name; that of the process if None.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, metavar="DIR", help="bundle to make smaller")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the smaller one goes")
    parser.add_argument("--head-rank", type=int, default=256, help="width of the heads' bottleneck (%(default)s)")
    parser.add_argument("--feedback-hidden", type=int, default=192, help="width in the feedback (%(default)s)")
    args = parser.parse_args(arguments)
    loaded = load_bundle(args.bundle)
    assert isinstance(loaded.encoder, Encoder)
    try:
        small = compress(loaded.encoder, args.head_rank, args.feedback_hidden)
    except ValueError as error:
        parser.error(str(error))
    save_bundle(args.out, loaded.generator, small, notes_of(loaded.info))
    size = sum(part.stat().st_size for part in Path(args.out).iterdir() if part.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
