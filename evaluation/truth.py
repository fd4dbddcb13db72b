"""The faces that everything is measured against: photos, or the generator's own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.degradation import DEGRADATIONS, Degradation, face_rngs
from data.faces import Faces
from data.image_io import from_uint8, to_uint8
from data.operator import Downscale
from models.bundle import Bundle

GENERATED = "generated"


class GeneratedFaces(Dataset[Tensor]):
    """The faces of a generator, on which a sampler that is right has a dispersion ratio of 1 whatever it generates."""

    def __init__(self, bundle: Bundle, count: int, seed: int = 0) -> None:
        self.bundle, self.seed, self.resolution = bundle, seed, bundle.resolution
        self.names = [f"{GENERATED}{i:05}" for i in range(count)]

    def __len__(self) -> int:
        """The number of faces."""
        return len(self.names)

    @torch.inference_mode()
    def __getitem__(self, index: int) -> Tensor:
        """Gives face `index` as uint8 (3, R, R)."""
        rng = np.random.default_rng((self.seed, index))
        z = rng.standard_normal((1, self.bundle.generator.z_dim), dtype=np.float32)
        return to_uint8(self.bundle.generator(torch.from_numpy(z).to(self.bundle.device)))[0].cpu().clone()


@dataclass(frozen=True)
class TruthSet:
    """Faces that can be read."""

    faces: Faces | GeneratedFaces
    indices: tuple[int, ...]  # of those that can be read
    problems: tuple[str, ...]  # a line for each that cannot
    hash: str  # of the names and pixels

    @classmethod
    def read(cls, faces: Faces | GeneratedFaces) -> TruthSet:
        """Looks at every face once; one that cannot be read never costs the others.

        Raises:
            ValueError: If none can be read.
        """
        digest, indices, problems = hashlib.sha256(), [], []
        for i, name in enumerate(faces.names):
            digest.update(f"{name}\n".encode())
            try:
                digest.update(faces[i].numpy().tobytes())
                indices.append(i)
            except (ValueError, OSError) as error:
                problems.append(str(error))
        if not indices:
            raise ValueError(f"Expected faces, none of them can be read: {problems[0]}")
        return cls(faces, tuple(indices), tuple(problems), digest.hexdigest())

    def __len__(self) -> int:
        """The number of faces that can be read."""
        return len(self.indices)

    def batch(self, part: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Gives faces (b, 3, R, R), uint8, and their places (b,) among all."""
        own = self.indices[part]
        return torch.stack([self.faces[i] for i in own]).to(device), torch.tensor(own)


@dataclass(frozen=True)
class Condition:
    """What the methods get to see."""

    lr_size: int  # in pixels
    degradation: Degradation = DEGRADATIONS["clean"]  # what happens besides downscaling

    @property
    def name(self) -> str:
        """Its key in results and file names: "16", or "16_noise25"."""
        return f"{self.lr_size}" if self.degradation.name == "clean" else f"{self.lr_size}_{self.degradation.name}"

    @property
    def title(self) -> str:
        """Its name in tables: "16 px", or "16 px, noise25"."""
        return self.name.replace("_", " px, ") if "_" in self.name else f"{self.name} px"

    def inputs(self, truth: Tensor, seed: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Makes LR faces of faces (B, 3, R, R), uint8: what the methods see, and the same without degradation.

        Both are (B, 3, s, s) in [-1, 1] with 8-bit values. The places of the faces, `indices` (B,), seed the noise: a
        face meets the same noise in whatever batch it comes.
        """
        faces, operator = from_uint8(truth), Downscale(self.lr_size)
        clean = from_uint8(to_uint8(operator(faces)))
        return self.degradation(faces, operator, face_rngs(seed, indices.tolist())), clean
