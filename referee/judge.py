"""The referee: the networks that measure, and what they say of one batch of faces."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from data.operator import Downscale, downscaling_error
from data.reading import from_uint8
from evaluation.frechet import frechet_metric
from losses.perceptual import LPIPS
from models.identity import Identity
from referee.measures import candidates_that_count, candidates_within, diversity, psnr

if TYPE_CHECKING:
    from models.attributes import AttributeClassifier
    from referee.niqe import Pristine

NIQE_FROM = 256  # px; below, its blocks of 96 px say nothing

Values = dict[str, Tensor]
"""What was measured, (B, …) on the CPU, by name."""


class Referee:
    """Measures pictures; holds the networks for it.

    Args:
        resolution: Size R of the faces in pixels.
        device: Where everything is computed.
        frechet: Keep the features of the Fréchet distance.
        attributes: Classifier of the forty attributes; None leaves them out.
        pristine: Model of natural pictures for NIQE; None leaves it out.

    Raises:
        FileNotFoundError: If LPIPS has no weights. Other networks without weights leave their measure out and warn.
    """

    def __init__(
        self,
        resolution: int,
        device: torch.device,
        frechet: bool = False,
        attributes: AttributeClassifier | None = None,
        pristine: Pristine | None = None,
    ) -> None:
        self.device, self.attributes = device, attributes
        self.pristine = pristine if resolution >= NIQE_FROM else None
        self.lpips = LPIPS().to(device)
        self.identity: Identity | None = None
        self.frechet: tuple[str, nn.Module] | None = None
        try:
            self.identity = Identity().to(device)
        except FileNotFoundError as error:
            warnings.warn(f"The identity similarity is left out (n/a). {error}", stacklevel=2)
        if frechet:
            try:
                name, metric = frechet_metric()
                self.frechet = name, metric.inception.to(device)
            except (OSError, ImportError) as error:  # a download or a package that is not to be had
                warnings.warn(f"The Fréchet distance is left out (n/a). {error}", stacklevel=2)

    @property
    def networks(self) -> dict[str, str | None]:
        """The networks by the measure they serve; None for a measure that is left out."""
        return {
            "lpips": "LPIPS 0.1, SqueezeNet 1.1",
            "identity": "MobileFaceNet y1, cosine" if self.identity else None,
            "frechet": self.frechet[0] if self.frechet else None,
        }

    @torch.no_grad()
    def look_at_truth(self, truth: Tensor) -> Values:
        """Measures what belongs to the true faces alone.

        Args:
            truth: Faces (B, 3, R, R), uint8.

        Returns:
            `features` (B, F) and `attributes` (B, A), as far as they are asked for.
        """
        return {name: value.cpu() for name, value in self._network_views(truth, from_uint8(truth)).items()}

    def _network_views(self, pictures: Tensor, images: Tensor) -> Values:
        """Features of the Fréchet distance and attributes of pictures (N, 3, R, R), as bytes and in [-1, 1]."""
        values: Values = {}
        if self.frechet:
            values["features"] = self.frechet[1](pictures).float()
        if self.attributes is not None:
            values["attributes"] = self.attributes(images) > 0
        return values

    @torch.no_grad()
    def measure(self, pictures: Tensor, truth: Tensor, lr: Tensor, clean: Tensor) -> Values:
        """Measures a method's candidates.

        Args:
            pictures: Candidates (B, c, 3, R, R), uint8, the best guess first.
            truth: Faces (B, 3, R, R), uint8.
            lr: What the method saw (B, 3, s, s) in [-1, 1].
            clean: The same without degradation (B, 3, s, s).

        Returns:
            Per face: psnr, ssim, lpips, identity, niqe of the best guess, and the diversities; per candidate (B, c):
            error, error_clean, attributes (B, c, A); features (B, 1 or 2, F) of the best guess and the second one.
        """
        images, faces = from_uint8(pictures), from_uint8(truth)
        best, c = images[:, 0], images.shape[1]
        flat, operator = images.flatten(0, 1), Downscale(lr.shape[-1])
        features = [f.unflatten(0, (-1, c)) for f in self.lpips.features(flat)]
        ssim = structural_similarity_index_measure((best + 1) / 2, (faces + 1) / 2, reduction="none", data_range=1.0)
        assert isinstance(ssim, Tensor)
        errors = downscaling_error(flat, lr.repeat_interleave(c, 0), operator).unflatten(0, (-1, c))  # (B, c)
        values = {
            "psnr": psnr(best, faces),
            "ssim": ssim.reshape(-1),
            "lpips": self.lpips.distance([f[:, 0] for f in features], self.lpips.features(faces)),
            "error": errors,
            "error_clean": downscaling_error(flat, clean.repeat_interleave(c, 0), operator).unflatten(0, (-1, c)),
        }
        if self.identity:
            values["identity"] = (self.identity(best) * self.identity(faces)).sum(dim=1)
        if self.pristine is not None:
            values["niqe"] = self.pristine.distance(best)
        if c > 1:
            values |= _diversities(self.lpips, features, errors)
        seen = pictures if self.attributes is not None else pictures[:, :2]
        views = self._network_views(seen.flatten(0, 1), from_uint8(seen.flatten(0, 1)))
        values |= {name: value.unflatten(0, (-1, seen.shape[1])) for name, value in views.items()}
        if "features" in values:
            values["features"] = values["features"][:, :2]
        return {name: value.cpu() for name, value in values.items()}


def _diversities(lpips: LPIPS, features: list[Tensor], errors: Tensor) -> Values:
    """Diversity and share of the candidates that count, by both rules."""
    values: Values = {}
    for suffix, counts in (("", candidates_that_count(errors)), ("_epsilon", candidates_within(errors))):
        values[f"diversity{suffix}"] = diversity(lpips, features, counts)
        values[f"count{suffix}"] = counts.float().mean(dim=1)
    return values


def means_of(values: Mapping[str, Tensor], epsilon: float) -> dict[str, float]:
    """Averages what was measured over faces, in double precision.

    Args:
        values: Of all faces, (N, …), see `Referee.measure`; with `passes` (N, c).
        epsilon: Tolerance of the downscaling error.

    Returns:
        Means by name: of the best guess, or with "_all" of all candidates.
    """
    means: dict[str, float] = {}
    for name, value in values.items():
        if name in ("features", "attributes"):
            continue
        value = value.double()
        if value.ndim == 1:
            means[name] = value.mean().item()
        elif name == "passes":
            means[name] = value.mean().item()  # a method works alike on all its candidates
        else:
            means[name], means[f"{name}_all"] = value[:, 0].mean().item(), value.mean().item()
    within = (values["error"] <= epsilon).double()
    means["within"], means["within_all"] = within[:, 0].mean().item(), within.mean().item()
    return means
