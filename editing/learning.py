"""Learns the steps of an edit, one for every style, by gradients through the generator and the classifier.

    min over d_1 … d_L of  E[ λ_s |s| / 2 log(1 + exp(−l'_own)) + λ_o mean_a (p'_a − p_a)² + λ_p LPIPS(x', x) ]
                           + λ_m mean_a E[ sign(s) (p'_a − p_a) ]²
    with  x' the face of  (w + s d_1, …, w + s d_L)  and  mean_l n · d_l = σ

Half of the faces are the generator's own; the others are encodings of such faces once they are small, which is what
edits are for: with their details, and the correction of the unedited face carried over (`editing.apply`). s is 2 for
half of the faces of either kind, towards the side where there is room, and 1 or −2 for a quarter each; the second mean
is that of a batch. l_own is the edit's own logit, as if half of all faces had the attribute, towards the side that it
goes to, and p_a the scores of all attributes that it shall leave alone, face by face and on average: what all faces
share weighs more. One step for all styles cannot take apart what the generator has together in W; a step for each can,
because layers differ in what they are for. The last line keeps what a strength means: a strength of 1 moves one
standard deviation along the normal of the hyperplane, averaged over the styles. All steps start as the hyperplane's.

Learning a direction by what a network sees in its pictures: Goetschalckx et al. 2019 "GANalyze"; a shift for each layer
of W+: Abdal et al. 2021 "StyleFlow", Patashnik et al. 2021 "StyleCLIP" (global directions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.image_io import from_uint8, to_uint8
from data.operator import Downscale, lift
from editing.hyperplane import Hyperplane, Whitening
from editing.names import attribute_of, synonyms_of
from losses.perceptual import LPIPS
from models.attributes import AttributeClassifier
from models.bundle import Bundle
from models.device import faces_at_once
from models.generator import Generator

STRENGTH = 2.0  # that edits are judged at
BATCH = 16
TRIAL_BATCHES, FIRST_TRIAL = 6, 1_000_000  # that an edit is measured on after learning
SMALLER = (4, 8)  # how many times the faces are downscaled that the encoder sees
LEARNING_RATE = 0.03  # in whitened coordinates, where a step begins with length 1
WARMUP = 10
OWN = {"young": 1.6, "brown-hair": 2.0, "smile": 1.4}  # λ_s, 1 for all others: with 1, these fall short
OTHERS = 10.0  # λ_o
SHARED = 30.0  # λ_m
PERCEPTUAL = 4.0  # λ_p
SHARES = (1.0, 1.0, 0.5, -1.0)  # of the strength that edits are judged at: to the side where there is room, and back
PERCENTILE = 90


@dataclass(frozen=True)
class Effect:
    """What an edit did to a set of faces, as mean changes of scores in [0, 1]."""

    target: float  # of its own attribute, in the edit's direction
    others: dict[str, float]  # of each other attribute, synonyms left out
    synonyms: dict[str, float]  # of the synonyms

    @classmethod
    def of(cls, name: str, changes: dict[str, float], side: int) -> Effect:
        """Sorts the mean changes of all scores by attribute, for the edit of that name and the side it went to, ±1."""
        attribute, sign = attribute_of(name)
        synonyms = synonyms_of(name)
        others = {other: c for other, c in changes.items() if other != attribute and other not in synonyms}
        return cls(changes[attribute] * sign * side, others, {o: changes[o] for o in sorted(synonyms & changes.keys())})

    @property
    def leakage(self) -> float:
        """The 90th percentile of the others' changes."""
        return float(np.percentile(np.abs(list(self.others.values())), PERCENTILE))


def rarer_side(rate: float, sign: int) -> int:
    """The side of an edit that fewer faces are on, ±1; `rate` have the attribute, `sign` is −1 for its opposite."""
    return 1 if (rate if sign > 0 else 1 - rate) <= 0.5 else -1


class Faces(NamedTuple):
    """Faces that can be edited."""

    ws: Tensor  # codes (N, L, D)
    details: dict[int, Tensor]  # by r (N, C, r, r)
    correction: Tensor  # added to the generator's faces, edited or not (N, 3, R, R)

    def synthesize(self, generator: Generator, offset: Tensor | float = 0.0) -> Tensor:
        """Synthesizes them with an offset of their codes, broadcast to (N, L, D): images (N, 3, R, R) in [-1, 1]."""
        return (_synthesize(generator, self.ws + offset, self.details) + self.correction).clamp(-1, 1)


def _synthesize(generator: Generator, ws: Tensor, details: dict[int, Tensor]) -> Tensor:
    """Synthesizes codes (N, L, D); in parts, and for the gradient once more, where memory is short."""
    at_once = faces_at_once(generator, torch.is_grad_enabled(), len(ws))

    def part(i: int) -> Tensor:
        rows = slice(i, i + at_once)
        return generator.synthesis(ws[rows], details={r: d[rows] for r, d in details.items()})

    if at_once == len(ws):
        return part(0)
    return torch.cat([checkpoint(part, i, use_reentrant=False) for i in range(0, len(ws), at_once)])  # type: ignore[misc]


class StepLearner:
    """Learns steps, and measures what they do.

    The encoder of the bundle sees every second face, downscaled; without a bundle all stay as they are.
    """

    def __init__(
        self,
        generator: Generator,
        classifier: AttributeClassifier,
        lpips: LPIPS,
        whitening: Whitening,
        bundle: Bundle | None = None,
        seed: int = 0,
    ) -> None:
        self.generator, self.classifier, self.lpips = generator, classifier, lpips
        self.whitening, self.bundle, self.seed = whitening, bundle, seed

    @torch.no_grad()
    def faces(self, number: int) -> Faces:
        """The batch of that number: B faces, at even places those that were encoded."""
        generator = self.generator
        z = np.random.default_rng((self.seed, number)).standard_normal((BATCH, generator.z_dim), dtype=np.float32)
        ws = generator.mapping(torch.from_numpy(z).to(generator.w_avg.device)).clone()
        images = _synthesize(generator, ws, {}).clamp(-1, 1)
        details: dict[int, Tensor] = {}
        correction = torch.zeros_like(images)
        if self.bundle is not None:
            smallest, largest = self.bundle.lr_sizes
            size = min(max(generator.resolution // SMALLER[number % len(SMALLER)], smallest), largest)
            lr = from_uint8(to_uint8(Downscale(size)(images[::2])))
            encoding = self.bundle.encode(lr)
            ws[::2] = encoding.ws[:, 0]
            for r, part in encoding.details.items():
                details[r] = part.new_zeros(BATCH, *part.shape[2:])
                details[r][::2] = part[:, 0]
            lacking = lr - Downscale(size)(_synthesize(generator, ws, details)[::2])
            correction[::2] = lift(lacking, generator.resolution)
        return Faces(ws, details, correction)

    def learn(
        self, name: str, plane: Hyperplane, steps: int, progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Learns the steps (L, D) of an edit in W, for a unit of strength.

        Args:
            name: Of the edit.
            plane: Of its attribute.
            steps: Of the optimizer; the first batches serve them.
            progress: Told 1 after each step of the optimizer.
        """
        sign, device = attribute_of(name)[1], self.generator.w_avg.device
        factor = torch.from_numpy(self.whitening.factor).float().to(device)  # C (D, D)
        normal = sign * torch.from_numpy(plane.normal).float().to(device)  # a (D,), of unit length
        u = normal.repeat(self.generator.num_ws, 1).requires_grad_()  # (L, D), d = C u
        optimizer = torch.optim.Adam([u], LEARNING_RATE, betas=(0.9, 0.99))
        # Each for a face of either kind.
        shares = torch.tensor(SHARES, device=device).repeat_interleave(2).repeat(BATCH // len(SHARES) // 2)  # (B,)
        strengths = self.side(name) * STRENGTH * shares
        for number in range(steps):
            remaining = 1 - number / steps
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (number + 1) / WARMUP) * remaining
            loss = self._loss(name, self.faces(number), strengths, strengths[:, None, None] * (u @ factor.T))
            (u.grad,) = torch.autograd.grad(loss, [u])
            optimizer.step()
            with torch.no_grad():  # the mean of a · u over styles stays 1, which is n · d = σ
                u += (1 - (u @ normal).mean()) * normal
            if progress is not None:
                progress(1)
        return (u @ factor.T).detach().cpu().double().numpy()

    @torch.no_grad()
    def measure(self, name: str, steps: np.ndarray) -> Effect:
        """Measures an edit of strength 2 towards the side where there is room, on faces that it was not learned on."""
        offset = self.side(name) * STRENGTH * torch.from_numpy(steps).float().to(self.generator.w_avg.device)
        changes = []
        for number in range(TRIAL_BATCHES):
            faces = self.faces(FIRST_TRIAL + number)
            before, after = (self._look(faces, o)[1].sigmoid() for o in (0.0, offset))
            changes.append(after - before)
        means = torch.cat(changes).mean(dim=0).tolist()
        return Effect.of(name, dict(zip(self.classifier.names, means, strict=True)), self.side(name))

    def side(self, name: str) -> int:
        """The side of an edit on which there is room: away from what most faces are."""
        attribute, sign = attribute_of(name)
        return rarer_side(float(self.classifier.rates[self.classifier.names.index(attribute)]), sign)

    def _loss(self, name: str, faces: Faces, strengths: Tensor, offsets: Tensor) -> Tensor:
        """What offsets (B, L, D) of strengths (B,) miss, and what else they do."""
        attribute, sign = attribute_of(name)
        names, synonyms = self.classifier.names, synonyms_of(name)
        left_alone = [i for i, other in enumerate(names) if other != attribute and other not in synonyms]
        with torch.no_grad():
            before, scores = self._look(faces, 0.0)
        after, edited = self._look(faces, offsets)
        towards = sign * strengths  # the sign of the own logit
        share = strengths.abs() / STRENGTH  # shorter edits need not get there
        reached = (share * F.softplus(-towards.sign() * edited[:, names.index(attribute)])).mean()
        changes = towards.sign()[:, None] * (edited.sigmoid() - scores.sigmoid())[:, left_alone]  # (B, A')
        leaked = OTHERS * changes.square().mean() + SHARED * changes.mean(dim=0).square().mean()
        return OWN.get(name, 1.0) * reached + leaked + PERCEPTUAL * self.lpips(after, before).mean()

    def _look(self, faces: Faces, offset: Tensor | float) -> tuple[Tensor, Tensor]:
        """Faces (B, 3, R, R) after an offset, and their balanced logits (B, A)."""
        images = faces.synthesize(self.generator, offset)
        return images, self.classifier.balanced(self.classifier(images))
