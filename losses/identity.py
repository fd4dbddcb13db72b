"""The identity loss: how far apart two faces are as persons."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def identity_loss(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    """Compares two persons by the cosine of their embeddings.

    L_id = 1 − ⟨a, b⟩ / (‖a‖ ‖b‖)

    Args:
        embeddings_a: Embeddings (B, E), see `models.identity.Identity`.
        embeddings_b: Embeddings (B, E) of the faces they should agree with.

    Returns:
        Losses (B,) in [0, 2]; 0 for the same direction, 1 for unrelated ones.

    References:
        Richardson et al. 2021, "Encoding in Style" (pSp), eq. 3.
    """
    return 1.0 - F.cosine_similarity(embeddings_a, embeddings_b, dim=1)
