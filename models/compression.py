"""Makes a trained encoder smaller: its widest linear maps keep only the directions that their outputs lie in.

    W x ≈ U_r (U_rᵀ W) x,    U_r the r main directions of E[u uᵀ], u = W x / ‖W x‖

Two narrow layers for a wide one. Of all maps of rank r, this one comes nearest to W, relative to the length of what W
gives, on the inputs that it is made for: those of faces on their way through encoder and feedback. (The main singular
values of W itself are the answer for inputs that vary alike in all directions, which features do not.) The style heads,
the two last layers of the feedback network, which are one linear map, and the first of the distribution's network.
Nothing is trained.

Examples:
    python -m models.compression --bundle runs/posterior_64/bundle --out runs/small
    python -m models.compression --bundle runs/posterior_64/bundle --out runs/small --faces celeba128_train.zip
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from data.faces import Faces
from data.operator import Downscale
from models.bundle import Bundle, load_bundle, save_bundle
from models.bundle_info import notes_of
from models.encoder import Encoder, StyleHead
from models.feedback import Feedback

FACES = 1024
SIZES = (16, 8, 16, 32, 16, 8, 4, 24)  # px, in turns: × 4 and × 8 most often
BATCH = 32


def split(weight: Tensor, outputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Splits a matrix into the two of a rank that come nearest to it on some outputs.

    Args:
        weight: W (m, n).
        outputs: Samples of W x (N, m).
        rank: r, from 1.

    Returns:
        U_r (m, r) and U_rᵀ W (r, n); zeros where r is more than there is.
    """
    # Each sample has the same say, however long: late passes of feedback take the smallest steps, and need all of them.
    samples = nn.functional.normalize(outputs.double(), dim=1)
    products = samples.T @ samples  # (m, m)
    directions = torch.linalg.eigh(products).eigenvectors.flip(1)[:, :rank]  # the main ones first
    narrow = directions.T @ weight.double()
    missing = max(0, rank - len(weight))
    pad = nn.functional.pad
    return pad(directions, (0, missing)).to(weight), pad(narrow, (0, 0, 0, missing)).to(weight)


@contextmanager
def _watching(layers: dict[str, nn.Linear]) -> Iterator[dict[str, list[Tensor]]]:
    """Collects what linear layers give, without their biases."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(lambda layer, _, y, name=name: seen[name].append(y.float() - layer.bias))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _wide_layers(encoder: Encoder) -> dict[str, nn.Linear]:
    """The layers that are split, by name."""
    layers: dict[str, nn.Linear] = {}
    for i, head in enumerate(encoder.heads):
        assert isinstance(head, StyleHead) and isinstance(head.linear, nn.Linear)
        layers[f"head {i}"] = head.linear
    if encoder.feedback is not None:
        layers["feedback"] = encoder.feedback.out
    if encoder.posterior is not None:
        assert isinstance(encoder.posterior.network.first, nn.Linear)
        layers["context"] = encoder.posterior.network.first
    return layers


@torch.no_grad()
def outputs_on(bundle: Bundle, faces: Tensor) -> dict[str, Tensor]:
    """Lets faces go through encoder and feedback, and collects what the wide layers give.

    Args:
        bundle: With full heads.
        faces: Sharp faces (N, 3, R, R) in [-1, 1].

    Returns:
        Outputs without biases (n, m) by the name of the layer: for the best guess and for a candidate of each face, in
        all passes.
    """
    assert isinstance(bundle.encoder, Encoder)
    smallest, largest = bundle.lr_sizes
    with _watching(_wide_layers(bundle.encoder)) as seen:
        for i, part in enumerate(faces.split(BATCH)):
            size = min(max(SIZES[i % len(SIZES)], smallest), largest)
            bundle.encode(Downscale(size)(part), 2)
    return {name: torch.cat(parts) for name, parts in seen.items()}


@torch.no_grad()
def compress(bundle: Bundle, faces: Tensor, head_rank: int, feedback_hidden: int, context_rank: int = 0) -> Encoder:
    """Makes a smaller encoder that computes nearly the same.

    Args:
        bundle: With a trained encoder that has full heads.
        faces: Sharp faces to look at what counts (N, 3, R, R) in [-1, 1]; a thousand, or more than the layers are wide.
        head_rank: Width of the heads' bottleneck.
        feedback_hidden: Width of the feedback's last layer but one, at most what it is now; 0 keeps it.
        context_rank: Width of a bottleneck in what the distribution sees of the features; 0 for none.

    Returns:
        The smaller encoder, in eval mode.

    Raises:
        ValueError: If a rank is out of range, or the heads have a bottleneck already.
    """
    encoder = bundle.encoder
    assert isinstance(encoder, Encoder)
    now = encoder.feedback.hidden.out_features if encoder.feedback is not None else 0
    if encoder.feedback is not None and encoder.feedback.small_rank:
        raise ValueError(
            "Expected feedback without additions for small faces, got some; make it smaller, then train them."
        )
    if head_rank < 1 or not 0 <= feedback_hidden <= now or context_rank < 0 or "head_rank" in encoder.config:
        raise ValueError(
            f"Expected a head rank from 1, a feedback width from 0 to {now}, a context rank from 0, and an encoder "
            f"with full heads, got {head_rank}, {feedback_hidden}, {context_rank} and {encoder.config}."
        )
    config = {**encoder.config, "head_rank": head_rank}
    if feedback_hidden:
        config["feedback_hidden"] = feedback_hidden
    if context_rank and encoder.posterior is not None:
        config["context_rank"] = context_rank
    small = Encoder(**config)
    state = {
        n: t for n, t in encoder.state_dict().items() if n in (own := small.state_dict()) and own[n].shape == t.shape
    }
    small.load_state_dict(state, strict=False)
    outputs = outputs_on(bundle, faces)
    for i, (old, new) in enumerate(zip(encoder.heads, small.heads, strict=True)):
        assert isinstance(old, StyleHead) and isinstance(new, StyleHead) and isinstance(new.linear, nn.Sequential)
        _fill(new.linear, old.linear, outputs[f"head {i}"])
    if "context_rank" in config and encoder.posterior is not None and small.posterior is not None:
        _fill(small.posterior.network.first, encoder.posterior.network.first, outputs["context"])
    if feedback_hidden and encoder.feedback is not None and small.feedback is not None:
        _compress_feedback(encoder.feedback, small.feedback, outputs["feedback"])
    return small.eval().requires_grad_(False)


def _fill(pair: nn.Module, full: nn.Module, outputs: Tensor) -> None:
    """Splits a linear map into the two of a bottleneck; `outputs` are its own without its bias."""
    assert isinstance(pair, nn.Sequential) and isinstance(full, nn.Linear)
    first, second = pair
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    wide, narrow = split(full.weight, outputs, first.out_features)
    first.weight.copy_(narrow)
    second.weight.copy_(wide)
    second.bias.copy_(full.bias)


def _compress_feedback(old: Feedback, new: Feedback, outputs: Tensor) -> None:
    """Splits the product of the two last layers; `outputs` are those of the last one without its bias."""
    constant = old.out.weight @ old.hidden.bias
    a, b = split(old.out.weight @ old.hidden.weight, outputs - constant, new.hidden.out_features)
    new.out.weight.copy_(a)
    new.hidden.weight.copy_(b)
    new.hidden.bias.zero_()
    new.out.bias.copy_(constant + old.out.bias)


def _read_faces(bundle: Bundle, source: str | None, count: int) -> Tensor:
    """Reads the first faces of a data set, or lets the generator draw some (N, 3, R, R)."""
    if source is not None:
        return Faces(source, bundle.resolution, limit=count).images()
    z = torch.randn(count, bundle.generator.z_dim, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return torch.cat([bundle.generator(part).clamp(-1, 1) for part in z.split(BATCH)])


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
    parser.add_argument("--head-rank", type=int, default=160, help="width of the heads' bottleneck (%(default)s)")
    parser.add_argument("--feedback-hidden", type=int, default=352, help="width in the feedback (%(default)s)")
    parser.add_argument("--context-rank", type=int, default=96, help="width in the distribution (%(default)s)")
    parser.add_argument("--faces", metavar="DATA", help="zip or folder of faces to look at (the generator's own)")
    args = parser.parse_args(arguments)
    loaded = load_bundle(args.bundle)
    assert isinstance(loaded.encoder, Encoder)
    try:
        faces = _read_faces(loaded, args.faces, FACES)
        small = compress(loaded, faces, args.head_rank, args.feedback_hidden, args.context_rank)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    save_bundle(args.out, loaded.generator, small, notes_of(loaded.info))
    size = sum(part.stat().st_size for part in Path(args.out).iterdir() if part.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
