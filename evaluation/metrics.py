"""What is measured on samples of faces: fidelity to the input, distance to the truth, spread, identity.

Three networks give features in which the squared Euclidean distance is the measure: LPIPS, VGG11, and EdgeFace, whose
distance is 1 − cos. For a true posterior the truth x is one more draw, so that
E d(x, s) = E d(s, s′) for each of them: the dispersion ratio E d(s, s′) / E d(x, s) is 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from data.image_io import from_uint8, to_uint8
from data.operator import Downscale
from evaluation.features import EdgeFace, InceptionFeatures, VGG11Features
from evaluation.frechet import frechet_distance, kernel_distance
from losses.perceptual import LPIPS

if TYPE_CHECKING:
    from evaluation.niqe import Pristine
    from models.attributes import AttributeClassifier

Values = dict[str, Tensor]
"""What was measured on each of B faces, (B, …) on the CPU, by name."""

Features = Sequence[Tensor]
"""One or more maps (…, C_l, h_l, w_l)."""

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "lpips": LPIPS,
    "vgg11": VGG11Features,
    "identity": EdgeFace,
    "inception": InceptionFeatures,
}
DEFAULT_NETWORKS = ("lpips", "vgg11", "identity")  # the last one is for the FID alone, and slow
MAX_PSNR = 100.0  # dB, of a picture that is exactly right
FRECHET_FACES = 1000  # below, distances between sets are too uncertain
NIQE_FROM = 256  # px; below, its blocks of 96 px say nothing
PIXELS_AT_ONCE = 64 * 128**2  # pictures go through the networks in batches of so many pixels


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Measures −10 log₁₀ mean ((a − b) / 2)² of images (…, C, H, W) that broadcast: dB (…), `MAX_PSNR` at most."""
    return (-10 * ((images - truth) / 2).square().mean(dim=(-3, -2, -1)).log10()).clamp(max=MAX_PSNR)


def lr_psnr(samples: Tensor, lr: Tensor) -> Tensor:
    """Measures how well samples (B, k, 3, R, R), rounded to 8 bit, downscale to inputs (B, 3, s, s): dB (B, k)."""
    downscaled = Downscale(lr.shape[-1])(eight_bit(samples).flatten(0, 1)).unflatten(0, samples.shape[:2])
    return psnr(downscaled, lr[:, None])


def eight_bit(images: Tensor) -> Tensor:
    """Clamps images (…, 3, H, W) to [-1, 1] and rounds them to the 256 values of a written picture."""
    return from_uint8(to_uint8(images))


def distance_map(a: Features, b: Features, size: int) -> Tensor:
    """Computes the distance at each pixel, Σ_l upsampled Σ_c (a_l − b_l)², as maps (N, size, size)."""
    maps = [(x - y).square().sum(dim=-3).flatten(0, -3)[:, None] for x, y in zip(a, b, strict=True)]  # (N, 1, h, w)
    return torch.cat([F.interpolate(m, size=(size, size), mode="bilinear") for m in maps], dim=1).sum(dim=1)


def distance(a: Features, b: Features) -> Tensor:
    """Computes Σ_l mean_{h,w} Σ_c (a_l − b_l)² of features (…, C_l, h_l, w_l) that broadcast; distances (…)."""
    return torch.stack([(x - y).square().sum(-3).mean((-2, -1)) for x, y in zip(a, b, strict=True)]).sum(dim=0)


def mean_pair_distance(features: Features) -> Tensor:
    """Computes the mean distance (B,) over all pairs of n ≥ 2 draws (B, n, C_l, h_l, w_l): twice the variance."""
    return 2 * torch.stack([f.var(dim=1).sum(dim=-3).mean(dim=(-2, -1)) for f in features]).sum(dim=0)


def ntire_diversity(truth: Features, samples: Features, size: int) -> Tensor:
    """Computes the diversity score of the NTIRE challenges, 100 (global best − local best) / global best.

    The global best is the smallest mean of a sample's distance map, the local best the mean of the smallest value over
    samples at each pixel (Lugmayr et al. 2021, section 3). The challenges take ten samples and LPIPS on AlexNet; scores
    on other maps or of another number of samples do not compare with theirs.

    Args:
        truth: Features of the truth (B, 1, C_l, h_l, w_l).
        samples: Features of n samples (B, n, C_l, h_l, w_l).
        size: Width of the pictures in pixels.

    Returns:
        Scores (B,) from 0 to 100; 0 for a sample that is the truth.
    """
    maps = distance_map(samples, truth, size).unflatten(0, samples[0].shape[:2])  # (B, n, R, R)
    best, local = maps.mean(dim=(2, 3)).amin(dim=1), maps.amin(dim=1).mean(dim=(1, 2))
    return 100 * (best - local) / best.clamp(min=1e-12)


class MetricSuite:
    """All measures of samples of faces, and the networks behind them: frozen, in evaluation mode.

    Sample 0 is the point estimate, the others are draws. A measure whose weights are missing is left out, with one
    line in the log.

    Args:
        device: Where the networks run.
        names: Which of `NETWORKS` to load.
        attributes: Classifier of the forty attributes; None leaves them out.
        pristine: Model of natural pictures for NIQE, which needs faces of 256 px; None leaves it out.
        lpips: Trunk of LPIPS, see `losses.perceptual.LPIPS`.

    Example:
        >>> suite = MetricSuite()
        >>> suite(faces, samples, lr)["ratio_lpips"]
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        names: Sequence[str] = DEFAULT_NETWORKS,
        attributes: AttributeClassifier | None = None,
        pristine: Pristine | None = None,
        lpips: str = "squeeze",
    ) -> None:
        self.device, self.attributes, self.pristine = torch.device(device), attributes, pristine
        self.networks: dict[str, Any] = {}
        for name in names:
            try:
                trunk = {"net": lpips} if name == "lpips" else {}
                self.networks[name] = NETWORKS[name](**trunk).to(self.device)
            except (OSError, ImportError) as error:
                logging.getLogger(__name__).warning("The measures by %s are left out (n/a). %s", name, error)

    def __call__(self, faces: Tensor, samples: Tensor, lr: Tensor) -> dict[str, float]:
        """Measures and summarizes all samples; see `measure` and `summarize`."""
        return summarize(self.measure(faces, samples, lr))

    @torch.no_grad()
    def measure(self, faces: Tensor, samples: Tensor, lr: Tensor) -> Values:
        """Measures samples of faces.

        Args:
            faces: Truths (B, 3, R, R) in [-1, 1].
            samples: Samples (B, k, 3, R, R), clamped to [-1, 1] and rounded to 8 bit here.
            lr: What the method saw (B, 3, s, s) in [-1, 1].

        Returns:
            Per face (B,) or per sample (B, k), see `summarize` for what becomes of them.

        Raises:
            ValueError: If the shapes do not belong together, or numbers are not finite.
        """
        if samples.ndim != 5 or samples[:, 0].shape != faces.shape or len(lr) != len(faces):
            raise ValueError(
                f"Expected faces (B, 3, R, R), samples (B, k, 3, R, R) and inputs (B, 3, s, s), got "
                f"{tuple(faces.shape)}, {tuple(samples.shape)} and {tuple(lr.shape)}."
            )
        if not samples.isfinite().all():
            raise ValueError("Expected finite pictures, got NaN or inf; look at the weights of the method.")
        at_once = max(1, PIXELS_AT_ONCE // (samples.shape[1] * faces.shape[-1] ** 2))
        parts = [
            self._measure_batch(*(part.to(self.device) for part in batch))
            for batch in zip(faces.split(at_once), samples.split(at_once), lr.split(at_once), strict=True)
        ]
        return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}

    def _measure_batch(self, faces: Tensor, samples: Tensor, lr: Tensor) -> Values:
        samples, point = eight_bit(samples), eight_bit(samples[:, 0])
        ssim = structural_similarity_index_measure((point + 1) / 2, (faces + 1) / 2, reduction="none", data_range=1.0)
        assert isinstance(ssim, Tensor)
        values = {"lr_psnr": lr_psnr(samples, lr), "psnr": psnr(point, faces), "ssim": ssim.reshape(-1)}
        if self.pristine is not None and faces.shape[-1] >= NIQE_FROM:
            values["niqe"] = self.pristine.distance(point)
        if self.attributes is not None:
            values["attributes"] = (self.attributes(samples.flatten(0, 1)) > 0).unflatten(0, samples.shape[:2])
            values["attributes_truth"] = self.attributes(faces) > 0
        for name in self.networks:
            truth = [f[:, None] for f in self.features(name, faces)]
            seen = [f.unflatten(0, samples.shape[:2]) for f in self.features(name, samples.flatten(0, 1))]
            if name != "lpips":
                values |= {f"{name}_features": seen[0].flatten(2), f"{name}_truth": truth[0].flatten(1)}
            if name == "inception":  # of sets alone
                continue
            values[name] = distance(seen, truth)  # (B, k)
            draws = [f[:, 1:] for f in seen]
            if draws[0].shape[1] > 1:
                values[f"{name}_pairs"] = mean_pair_distance(draws)
                if name == "lpips":
                    values["ntire_diversity"] = ntire_diversity(truth, draws, faces.shape[-1])
        return values

    def features(self, name: str, images: Tensor) -> Features:
        """Computes features of images (N, 3, R, R) in [-1, 1], in which `distance` is the measure of that name."""
        network = self.networks[name]
        if name == "lpips":
            return network.features(images)
        if name == "identity":
            return [network(images)[..., None, None] * math.sqrt(0.5)]  # ½ ‖a − b‖² = 1 − cos
        return [network((images + 1) / 2)[..., None, None]]


def summarize(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Averages what was measured over faces.

    Args:
        values: Of all faces, see `MetricSuite.measure`.

    Returns:
        By name, as far as networks and k allow. "point" is sample 0, "draw" the mean over the others, "draws" the mean
        over their pairs, ratios are draws / draw:
        lr_psnr, lr_psnr_worst (dB, over all samples); psnr (dB), ssim, niqe (of the point estimate); lpips_point,
        lpips_draw, lpips_draws, lpips_best, lpips_mean (of all k samples); ratio_lpips, ratio_vgg11, ratio_identity;
        ntire_diversity (of the draws); identity_point, identity_draw, identity_draws (cosines); rank1_point, rank1_draw
        (share of samples nearest to their own among all truths); fd_vgg11, kid_vgg11, fid (of one draw a face, from
        `FRECHET_FACES` on).
    """
    v = {name: value.double() for name, value in values.items()}
    found = {"lr_psnr": v["lr_psnr"].mean(), "lr_psnr_worst": v["lr_psnr"].min()}
    found |= {name: v[name].mean() for name in ("psnr", "ssim", "niqe", "ntire_diversity") if name in v}
    for name in [name for name in NETWORKS if name in v]:
        means = {"point": v[name][:, 0].mean()}
        if v[name].shape[1] > 1:
            means["draw"] = v[name][:, 1:].mean()
        if f"{name}_pairs" in v:
            means["draws"] = v[f"{name}_pairs"].mean()
            found[f"ratio_{name}"] = means["draws"] / means["draw"]
        if name != "vgg11":
            found |= {f"{name}_{k}": 1 - mean if name == "identity" else mean for k, mean in means.items()}
    if "lpips" in v:
        found |= {"lpips_best": v["lpips"].amin(dim=1).mean(), "lpips_mean": v["lpips"].mean()}
    if "identity_features" in v:
        right = rank1(v["identity_features"], v["identity_truth"])
        found["rank1_point"] = right[:, 0].mean()
        if right.shape[1] > 1:
            found["rank1_draw"] = right[:, 1:].mean()
    result = {name: float(value) for name, value in found.items()}
    if len(v["psnr"]) < FRECHET_FACES:
        return result
    for name, frechet in (("vgg11", "fd_vgg11"), ("inception", "fid")):
        if f"{name}_features" in v:
            one = v[f"{name}_features"][:, :2][:, -1]  # the first draw, the point estimate if there is none
            result[frechet] = frechet_distance(v[f"{name}_truth"], one)
            if name == "vgg11":
                result["kid_vgg11"] = kernel_distance(v["vgg11_truth"], one)
    return result


def attribute_rates(values: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Compares how often a classifier finds attributes in samples and in truth.

    Returns:
        By name: `rate` among all samples, `truth`, and `agreement`, the share of faces whose point estimate has what
        the truth has.
    """
    seen, truth = values["attributes"].double(), values["attributes_truth"].double()
    columns = seen.mean(dim=(0, 1)), truth.mean(dim=0), (seen[:, 0] == truth).double().mean(dim=0)
    rows = zip(names, *(column.tolist() for column in columns), strict=True)
    return {name: {"rate": rate, "truth": true, "agreement": agreement} for name, rate, true, agreement in rows}


def rank1(samples: Tensor, truth: Tensor) -> Tensor:
    """Says which samples (N, k, F) are nearer to their own truth (N, F) than to any other: 1 or 0 (N, k), double."""
    nearest = (samples @ truth.T).argmax(dim=-1)  # (N, k)
    return (nearest == torch.arange(len(truth), device=nearest.device)[:, None]).double()
