"""How unfamiliar a face is to a bundle, and the limits that held-out photos set.

The codes of photos follow a Gaussian with a few wide directions (probabilistic PCA, Tipping & Bishop 1999). For codes w
with mean μ, directions u_i of variance λ_i, and σ² elsewhere,

    d² = Σ_i (u_iᵀ(w − μ))² / λ_i + (‖w − μ‖² − Σ_i (u_iᵀ(w − μ))²) / σ²

`python -m evaluation.familiarity` measures all of it on held-out photos. Arrays alone, so that it runs without torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

FILE = "familiarity.npz"  # in the bundle's folder
SHARE = 0.98  # of held-out photos lies below the limits
RANK = 64


@dataclass(frozen=True)
class Familiarity:
    """What is known of the codes and residuals of held-out photos.

    Attributes:
        bundle: Hash of the bundle that they are of.
        mean: μ (L D).
        directions: u_i (k, L D), of length 1.
        variances: λ_i (k,).
        rest: σ².
        sizes: LR sizes in pixels (n,), rising.
        distances: d² that SHARE of the photos do not exceed, for each size (n,).
        residuals: Mean square of y − D(G(w)) on [0, 1] that SHARE of the photos do not exceed (n,).
    """

    bundle: str
    mean: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    rest: float
    sizes: np.ndarray
    distances: np.ndarray
    residuals: np.ndarray

    @classmethod
    def load(cls, folder: Path, bundle: str) -> Familiarity | None:
        """Reads the file of a bundle; None if there is none, or it is another bundle's."""
        if not (folder / FILE).is_file():
            return None
        with np.load(folder / FILE) as content:
            values = {name: content[name] for name in content.files}
        known = cls(**values | {"bundle": str(values["bundle"]), "rest": float(values["rest"])})
        return known if known.bundle == bundle else None

    def save(self, path: Path) -> None:
        """Writes the file, in single precision."""
        values = {name: np.float32(v) if isinstance(v, np.ndarray) else v for name, v in asdict(self).items()}
        with path.open("wb") as file:
            np.savez(file, **values)  # type: ignore[arg-type]  # numpy's stub takes them for allow_pickle

    def distance(self, ws: np.ndarray) -> np.ndarray:
        """Measures d² of codes (B, L, D), (B,)."""
        return gaussian_distance(ws.reshape(len(ws), -1), self.mean, self.directions, self.variances, self.rest)

    def is_unfamiliar(self, ws: np.ndarray, lr_size: int) -> bool:
        """Says whether codes (L, D) of a face of such a size lie farther away than those of photos."""
        return bool(self.distance(ws[None])[0] > self._limit(self.distances, lr_size))

    def is_unexplained(self, residual: float, sigma: float, lr_size: int) -> bool:
        """Says whether the generator explains a face of such a size and noise worse than photos."""
        return bool(unexplained(np.array(residual), np.array(sigma)) > self._limit(self.residuals, lr_size))

    def _limit(self, values: np.ndarray, lr_size: int) -> float:
        """Interpolates between sizes, logarithms against logarithms."""
        return float(np.exp(np.interp(np.log(lr_size), np.log(self.sizes), np.log(values))))


def unexplained(residual: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Takes the noise, of standard deviation σ in grey levels, off the mean square of y − D(G(w)) on [0, 1]."""
    return np.maximum(residual - (sigma / 255) ** 2, 1e-9)


def fit_gaussian(codes: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Fits the Gaussian by maximum likelihood, from codes (N, n), N > rank: μ, u, λ and σ²."""
    mean = codes.mean(axis=0)
    _, lengths, directions = np.linalg.svd(codes - mean, full_matrices=False)
    variances = lengths**2 / len(codes)
    rest = variances[rank:].sum() / (codes.shape[1] - rank)
    return mean, directions[:rank], variances[:rank], float(rest)


def gaussian_distance(
    codes: np.ndarray, mean: np.ndarray, directions: np.ndarray, variances: np.ndarray, rest: float
) -> np.ndarray:
    """Measures d² of codes (B, n), (B,)."""
    offsets = codes.astype(np.float64) - mean
    along = offsets @ directions.T.astype(np.float64)  # (B, k)
    return (along**2 / variances).sum(axis=1) + ((offsets**2).sum(axis=1) - (along**2).sum(axis=1)) / rest
