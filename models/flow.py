"""A masked autoregressive flow over W, the prior of the regularized latent search: how likely is a code?

The flow f maps a code to u, standard normal where w is one of the generator's own codes, so that

    log p(w) = log N(u; 0, I) + log |det ∂u/∂w|,

and ‖u‖ lies close to √D. It begins with a fixed affine map, for which there are two choices:

    plain       u = f((w − μ) / s), mean and standard deviation of each number, as in the paper
    whitened    u = f(F⁻¹ (lrelu₅(w) − μ)) with the Gaussian of v = lrelu₅(w), which leaves the flow much less to do

Codes fill their space very unevenly: along some directions they hardly differ, and there the density falls by thousands
of nats within a step of the search. So it is learned of codes blurred by a little noise, a tenth of their spread.

It is stored in a file of its own, `flow.safetensors`, or within a bundle's `latents.safetensors`, and belongs to one
generator.

    python train.py fit --config configs/flow_64.yaml                                # trains one
    python -m models.flow --bundle bundles/celeba64 --flow runs/flow_64/flow.safetensors    # puts it into a bundle

References:
    Papamakarios et al. 2017, Masked autoregressive flow for density estimation.
    Gheisari & Genovesio 2022, Super-resolution through StyleGAN regularized latent search: 5 blocks, 1024 hidden.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from data.console import blame, print_line, run_command
from models.bundle import FLOW_PREFIX, add_to_latents
from models.bundle_info import DEFAULT_BUNDLE, GENERATOR
from models.checkpoints import sha256_of, to_half, write_safetensors
from models.latents import gaussianize, ungaussianize

if TYPE_CHECKING:
    from models.bundle import Bundle

LOG_5 = math.log(5.0)  # the slope of v = lrelu₅(w) below zero


class FlowPrior(nn.Module):
    """The flow f with its affine map.

    Args:
        w_dim: Width D of w.
        blocks: Autoregressive transformations, in alternating order.
        hidden: Width of each one's network.
        whiten: Which affine map, see the module.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, w_dim: int, blocks: int = 5, hidden: int = 1024, whiten: bool = True) -> None:
        super().__init__()
        import zuko  # late: only this prior needs it

        self.config = {"w_dim": w_dim, "blocks": blocks, "hidden": hidden, "whiten": whiten}
        self.whiten = whiten
        self.register_buffer("mean", torch.zeros(w_dim))
        self.register_buffer("scale", torch.eye(w_dim))
        self.transforms = zuko.flows.MAF(w_dim, transforms=blocks, hidden_features=(hidden,)).transform

    @torch.no_grad()
    def fit_scale(self, w: Tensor) -> None:
        """Measures the affine map on codes (N, D) like those that the flow is to learn, N well above D."""
        if self.whiten:
            mean, factor = gaussian_of(w)
            self.mean.copy_(mean)
            eye = torch.eye(len(mean), dtype=mean.dtype, device=w.device)
            self.scale.copy_(torch.linalg.solve_triangular(factor, eye, upper=False))
        else:
            self.mean.copy_(w.mean(dim=0))
            self.scale.copy_(torch.diag(1 / w.std(dim=0).clamp(min=1e-6)))

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Maps codes w (…, D) to u (…, D) and the log density log p(w) (…,), in nats."""
        log_slope = torch.linalg.slogdet(self.scale)[1]
        if self.whiten:
            log_slope = log_slope + LOG_5 * (w < 0).sum(dim=-1)
        x = ((gaussianize(w) if self.whiten else w) - self.mean) @ self.scale.T
        u, log_det = self.transforms().call_and_ladj(x)
        log_normal = -0.5 * (u.square().sum(dim=-1) + u.shape[-1] * math.log(2 * math.pi))
        return u, log_normal + log_det + log_slope

    @torch.no_grad()
    def sample(self, u: Tensor) -> Tensor:
        """The inverse, standard normal u (…, D) to codes w (…, D); it takes D passes of each block."""
        x = torch.linalg.solve(self.scale, self.transforms().inv(u).mT).mT + self.mean
        return ungaussianize(x) if self.whiten else x


def gaussian_of(w: Tensor) -> tuple[Tensor, Tensor]:
    """Measures the Gaussian of v = lrelu₅(w), as `models.latents` does, on codes (N, D).

    Returns:
        Mean μ (D,) and factor F (D, D) of the covariance, lower triangular, in double precision.
    """
    v = gaussianize(w).double()
    jitter = 1e-6 * torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    return v.mean(dim=0), torch.linalg.cholesky(torch.cov(v.T) + jitter)


def flow_tensors(flow: FlowPrior) -> dict[str, Tensor]:
    """Gives what has to be stored: the networks in float16, the affine map in float32, in which small numbers count.

    The masks follow from the settings. ValueError if a number exceeds float16.
    """
    state = {name: t.detach().cpu().contiguous() for name, t in flow.state_dict().items() if t.is_floating_point()}
    return to_half(state) | {name: state[name] for name in ("mean", "scale")}


def flow_from(tensors: dict[str, Tensor], config: dict[str, Any], where: str) -> FlowPrior:
    """Builds a frozen flow from `flow_tensors` and the arguments of `FlowPrior`; ValueError if they do not fit."""
    try:
        flow = FlowPrior(**config)
        missing = {name for name, t in flow.state_dict().items() if t.is_floating_point()} ^ tensors.keys()
        if missing:
            raise ValueError(f"{len(missing)} tensors missing or left over, such as {min(missing)}")
        flow.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: expected a flow with {config}, found another ({error}); train it again.") from error
    return flow.eval().requires_grad_(False)


def save_flow(flow: FlowPrior, path: Path, generator_sha256: str) -> None:
    """Writes flow.safetensors, with the sha256 of the generator's file in its header."""
    notes = {"generator_sha256": generator_sha256, "flow": json.dumps(flow.config, sort_keys=True)}
    write_safetensors(flow_tensors(flow), path, notes)


def load_flow(path: str | Path, generator_sha256: str | None = None) -> FlowPrior:
    """Reads a flow, frozen, on the CPU, from its own file or from a bundle's latents.safetensors.

    Args:
        path: The file.
        generator_sha256: Of the generator's file that it must belong to; None accepts any.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no flow, or one for another generator.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a flow at {path}, found no such file; train one with configs/flow_64.yaml.")
    try:
        with safe_open(path, framework="pt") as file:
            notes, names = file.metadata() or {}, list(file.keys())
            prefix = FLOW_PREFIX if any(name.startswith(FLOW_PREFIX) for name in names) else ""
            tensors = {n.removeprefix(prefix): file.get_tensor(n) for n in names if n.startswith(prefix)}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); copy it again.") from error
    if "flow" not in notes:
        raise ValueError(
            f"{path}: expected a flow over the generator's codes, found none; train one with configs/flow_64.yaml, "
            "then python -m models.flow --bundle BUNDLE --flow runs/flow_64/flow.safetensors"
        )
    if generator_sha256 not in (None, notes.get("generator_sha256")):
        raise ValueError(
            f"{path}: expected a flow for the generator with sha256 {generator_sha256}, found one for "
            f"{notes.get('generator_sha256')}; train one for this generator."
        )
    return flow_from(tensors, json.loads(notes["flow"]), str(path))


def flow_of(bundle: Bundle) -> FlowPrior:
    """Gives a bundle's flow on its device, read when it is first asked for; ValueError if it has none."""
    if bundle.latents_path is None:
        raise ValueError(f"Expected a bundle from a folder, {bundle.name!r} was made in memory; load it from one.")
    return _read_once(bundle.latents_path, bundle.hash, bundle.device)


@lru_cache(maxsize=2)
def _read_once(path: Path, bundle_hash: str, device: torch.device) -> FlowPrior:
    return load_flow(path).to(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Puts a flow into a bundle; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="default: bundles/celeba64")
    parser.add_argument("--flow", type=Path, required=True, help="flow.safetensors of a training")
    args = parser.parse_args(arguments)
    return run_command("models.flow", lambda: _add(args.flow, args.bundle))


def _add(path: Path, bundle: Path) -> int:
    with blame("--bundle"):
        owner = sha256_of(bundle / GENERATOR)
    with blame("--flow"):
        flow = load_flow(path, owner)
    tensors = {FLOW_PREFIX + name: tensor for name, tensor in flow_tensors(flow).items()}
    add_to_latents(bundle, tensors, {"flow": json.dumps(flow.config, sort_keys=True)})
    print_line(f"The flow is in {bundle}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
