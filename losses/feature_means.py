"""How far the mean picture lies from that of the truths, in the features of LPIPS.

    L = Σ_k share_k ‖m_k‖²,    m_k = E[φ(x̂) − φ(x)],    φ averaged over the pixels

Corrections that fit a low-resolution input leave traces that no single face shows enough of for LPIPS to mind, but that
all faces share: the mean of their features drifts away from that of photos, which is most of what a Fréchet distance
sees. Matching means of features: Salimans et al. 2016 "Improved Techniques for Training GANs", section 3.1.

A batch is too small to know its mean: the difference of few pictures is mostly chance. So the means run along over many
batches, each group k of pictures (such as those of one LR size) with its own, and a batch's gradient is that of
2 ⟨m_k, its own mean⟩, with m_k of the batches before it. Several processes share their means.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureMeans(nn.Module):
    """The running means of groups of pictures, and the loss on them; buffers, so that a training resumes exactly.

    Args:
        groups: Number of groups K.
        width: Channels of all features together.
        halflife: Pictures of a group after which half of what was before is forgotten.
    """

    means: Tensor
    seen: Tensor

    def __init__(self, groups: int, width: int, halflife: float = 200.0) -> None:
        super().__init__()
        self.halflife = halflife
        self.register_buffer("means", torch.zeros(groups, width))
        self.register_buffer("seen", torch.zeros(groups))

    def forward(self, drawn: Sequence[Tensor], truth: Sequence[Tensor], group: Tensor) -> Tensor:
        """Compares pictures with their truths, and takes them into the means.

        Args:
            drawn: Features of pictures (B, C_l, H_l, W_l), such as `LPIPS.features`.
            truth: Features of their truths, of the same shapes.
            group: The group of each picture (B,), whole numbers from 0 to K − 1.

        Returns:
            An estimate of L, without bias as far as the network has not moved since; it may be below zero. Groups
            that are seen for the first time add nothing.
        """
        apart = torch.cat(
            [(a - b).mean(dim=(2, 3)) for a, b in zip(drawn, truth, strict=True)], dim=1
        ).float()  # (B, C)
        before = self.means[group]  # (B, C), zero where nothing is known
        self._take_in(apart.detach(), group)
        # Of the value a · b and the gradient 2 b: b has chance in it too, which b · b would add to the value.
        return ((2 * apart - apart.detach()) * before).sum(dim=1).mean()

    @torch.no_grad()
    def _take_in(self, apart: Tensor, group: Tensor) -> None:
        members = F.one_hot(group, len(self.seen)).to(apart)  # (B, K)
        # Not a matrix product, which autocast would take in bfloat16.
        sums, count = (members[:, :, None] * apart[:, None]).sum(dim=0), members.sum(dim=0)  # (K, C), (K,)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in (sums, count):
                torch.distributed.all_reduce(total)
        self.seen += count
        # Of the first pictures, all have the same say.
        share = torch.maximum(1 - 0.5 ** (count / self.halflife), count / self.seen.clamp(min=1))
        self.means.lerp_(sums / count.clamp(min=1)[:, None], share[:, None])
