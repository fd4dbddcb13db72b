"""What a network sees in faces that was trained to find eyes, nose and mouth: the O-Net of MTCNN.

Its weights come with the package facenet-pytorch. No loss on single faces uses it; it serves `losses.feature_means`
beside LPIPS, whose own network is the one that all corrections are trained to please: in its features, the mean of
corrected faces comes nearer to that of photos than the generator's own faces do, while others still see a difference.

Its authors trained it on CelebA, among others: it may have seen the people of a validation set.

Source: Zhang et al. 2016 "Joint Face Detection and Alignment Using Multitask Cascaded Convolutional Networks".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.frozen import Frozen

SIZE = 48  # px, of the faces that it was trained on


class FaceParts(Frozen):
    """The features of the O-Net, frozen, and not part of any checkpoint.

    Raises:
        ImportError: If facenet-pytorch is not installed.
    """

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        try:
            from facenet_pytorch.models.mtcnn import ONet  # late: only trainings that ask for it need the package
        except ImportError as error:
            raise ImportError(
                "Expected facenet-pytorch, which brings the O-Net's weights along; pip install "
                '"facenet-pytorch>=2.5.3,<2.6" --no-deps, or set weight_parts to 0.'
            ) from error
        network = ONet()
        parts = [(getattr(network, f"conv{i}"), getattr(network, f"prelu{i}")) for i in (1, 2, 3, 4)]
        self.levels = nn.ModuleList(nn.Sequential(*pair) for pair in parts)
        self.pools = nn.ModuleList([nn.Identity(), network.pool1, network.pool2, network.pool3])
        self.width = sum(len(prelu.weight) for _, prelu in parts)  # channels of all features together
        self.register_buffer("scale", torch.ones(self.width), persistent=False)
        self.freeze().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def calibrate(self, faces: Tensor) -> None:
        """Sets the scale of each channel by photos (B, 3, R, R) in [-1, 1], so that their spread over faces is 1."""
        self.scale.fill_(1)
        self.scale = 1 / (self(faces) * len(self.scale) ** 0.5).std(dim=0).flatten().clamp(min=1e-4)

    def forward(self, images: Tensor) -> Tensor:
        """Computes means of features.

        Args:
            images: Faces (B, 3, R, R) in [-1, 1].

        Returns:
            Features (B, C, 1, 1), means over the picture, times 1 / √C and the scale of their channels.
        """
        x = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        means: list[Tensor] = []
        for pool, level in zip(self.pools, self.levels, strict=True):
            x = level(pool(x))
            means.append(x.float().mean(dim=(2, 3)))
        return (torch.cat(means, dim=1) * self.scale / len(self.scale) ** 0.5)[:, :, None, None]
