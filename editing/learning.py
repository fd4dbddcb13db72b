"""Learns the steps of an edit, one for every layer, by gradients through the generator and the classifier.

    min over d_1 … d_L of  E[ λ_s |s| / 2 log(1 + exp(−l'_own)) + λ_o mean_a (p'_a − p_a)² + λ_p LPIPS(x', x) ]
                           + λ_m mean_a E[ sign(s) (p'_a − p_a) ]²
    with  x = g(w),  x' = g(w + s d_1, …, w + s d_L)  and  mean_l n · d_l = σ

Half of the faces are the generator's own; the others are what the encoder makes of them once they are small, which is
what edits are for. s is 2 for half of the faces of either kind, towards the side where there is room, and 1 or −2 for a
quarter each; the second mean is that of a batch. l_own is the edit's own logit, as if half of all faces had the
attribute, towards the side that it goes to, and p_a the scores of all attributes that it shall leave alone, face by
face and in the mean: what all faces share weighs more. One direction for all layers cannot take apart what the
generator draws together in W; a direction for each can, because layers differ in what they draw. The last line keeps
what a strength means: a strength of 1 goes one standard deviation along the normal of the hyperplane, in the mean of
the layers. All directions start as the one of the hyperplane without conditions, so that nothing else has to be chosen.

Learning a direction by what a network sees in its pictures: Goetschalckx et al. 2019 "GANalyze"; a shift for each layer
of W+: Abdal et al. 2021 "StyleFlow", Patashnik et al. 2021 "StyleCLIP" (global directions).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.image_io import from_uint8, to_uint8
from data.operator import Downscale
from editing.choosing import STRENGTH, rarer_side
from editing.fitting import Hyperplane, Whitening
from editing.names import attribute_of, synonyms_of
from editing.sampling import sample_w
from losses.perceptual import LPIPS
from models.attributes import AttributeClassifier
from models.bundle import Bundle
from models.generator import Generator

BATCH = 16
SMALLER = (4, 8)  # how many times the faces are downscaled that the encoder sees
LEARNING_RATE = 0.03  # in whitened coordinates, where a direction begins with length 1
WARMUP = 10
OWN = {"young": 1.6, "brown-hair": 2.0, "smile": 1.4}  # λ_s, 1 for all others: with 1, these fall short
OTHERS = 10.0  # λ_o
SHARED = 30.0  # λ_m
PERCEPTUAL = 4.0  # λ_p
SHARES = (1.0, 1.0, 0.5, -1.0)  # of the strength that edits are judged at: to the side where there is room, and back


@torch.inference_mode()
def codes_to_learn_on(
    generator: Generator, steps: int, seed: int, bundle: Bundle | None, progress: Callable[[int], object] | None = None
) -> Tensor:
    """Samples the faces that steps are learned on.

    Args:
        generator: Draws them.
        steps: Of the optimiser, a batch each.
        seed: Of the faces.
        bundle: Its encoder sees every second one, downscaled; None leaves all as they are.
        progress: Told the number of faces of each batch.

    Returns:
        Codes (steps · B, L, D) on the CPU: at even places those of the encoder.
    """
    ws = sample_w(generator, steps * BATCH, seed)[:, None].repeat(1, generator.num_ws, 1)
    for number, part in enumerate(ws.split(BATCH)):  # views
        if bundle is not None:
            smallest, largest = bundle.lr_sizes
            size = min(max(generator.resolution // SMALLER[number % len(SMALLER)], smallest), largest)
            images = generator.synthesis(part[::2].to(generator.w_avg.device), noise_mode="const")
            part[::2] = bundle.encode(from_uint8(to_uint8(Downscale(size)(images))))[:, 0].cpu()
        if progress is not None:
            progress(len(part))
    return ws


class StepLearner:
    """Learns steps on given faces.

    It keeps the features of a batch of 16 faces for the gradient: larger generators want a large GPU, or one direction
    for all layers (`editing.choosing`), which takes no gradient.

    Args:
        generator: Draws.
        classifier: Scores.
        lpips: Compares.
        whitening: Of W.
        codes: Of the faces (N, L, D), such as `codes_to_learn_on` gives; 16 serve a step of the optimiser.
    """

    def __init__(
        self,
        generator: Generator,
        classifier: AttributeClassifier,
        lpips: LPIPS,
        whitening: Whitening,
        codes: Tensor,
    ) -> None:
        self.generator, self.classifier, self.lpips = generator, classifier, lpips
        self.whitening, self.batches = whitening, codes.clone().split(BATCH)  # no longer of inference alone

    def learn(
        self, name: str, plane: Hyperplane, steps: int, progress: Callable[[int], object] | None = None
    ) -> np.ndarray:
        """Learns the steps of an edit.

        Args:
            name: Of the edit.
            plane: Of its attribute.
            steps: Of the optimiser; the first faces serve them.
            progress: Told 1 after each step of the optimiser.

        Returns:
            One step for each layer (L, D), a unit of strength, in W.
        """
        attribute, sign = attribute_of(name)
        names, device = self.classifier.names, self.generator.w_avg.device
        own = names.index(attribute)
        side = rarer_side(float(self.classifier.rates[own]), sign)
        left_alone = [i for i, other in enumerate(names) if i != own and other not in synonyms_of(name)]
        factor = torch.from_numpy(self.whitening.factor).float().to(device)  # C (D, D)
        normal = sign * torch.from_numpy(plane.normal).float().to(device)  # a (D,), of unit length
        u = normal.repeat(self.generator.num_ws, 1).requires_grad_()  # (L, D), d = C u
        optimiser = torch.optim.Adam([u], LEARNING_RATE, betas=(0.9, 0.99))
        # Each for a face of either kind.
        shares = torch.tensor(SHARES, device=device).repeat_interleave(2).repeat(BATCH // len(SHARES) // 2)  # (B,)
        strengths = side * STRENGTH * shares
        for number, ws in enumerate(self.batches[:steps]):
            remaining = 1 - number / steps
            optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(1, (number + 1) / WARMUP) * remaining
            terms = self._loss(
                ws.to(device), strengths[:, None, None] * (u @ factor.T), strengths * sign, own, left_alone
            )
            loss = OWN.get(name, 1.0) * terms[0] + terms[1]
            (u.grad,) = torch.autograd.grad(loss, [u])
            optimiser.step()
            with torch.no_grad():  # a · u stays 1 in the mean of the layers, which is n · d = σ
                u += (1 - (u @ normal).mean()) * normal
            if progress is not None:
                progress(1)
        return (u @ factor.T).detach().cpu().double().numpy()

    def _loss(
        self, ws: Tensor, offsets: Tensor, towards: Tensor, own: int, left_alone: list[int]
    ) -> tuple[Tensor, Tensor]:
        """What offsets to codes, both (B, L, D), miss, and what else they do; towards (B,) has the own logit's sign."""
        with torch.no_grad():
            before, scores = self._look(ws)
        after, edited = self._look(ws + offsets)
        share = towards.abs() / STRENGTH  # shorter edits need not get there
        reached = (share * F.softplus(-towards.sign() * edited[:, own])).mean()
        changes = towards.sign()[:, None] * (edited.sigmoid() - scores.sigmoid())[:, left_alone]  # (B, A')
        drift = OTHERS * changes.square().mean() + SHARED * changes.mean(dim=0).square().mean()
        return reached, drift + PERCEPTUAL * self.lpips(after, before).mean()

    def _look(self, ws: Tensor) -> tuple[Tensor, Tensor]:
        """The faces (B, 3, R, R) of codes (B, L, D), and their balanced logits (B, A)."""
        images = self.generator.synthesis(ws, noise_mode="const").clamp(-1, 1)
        return images, self.classifier.balanced(self.classifier(images))
