"""The identity loss: how far apart two faces are as persons."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def identity_loss(embeddings_a: Tensor, embeddings_b: Tensor) -> Tensor:
    """Computes 1 − ⟨a, b⟩ / (‖a‖ ‖b‖) of embeddings (B, E) of two faces: losses (B,) in [0, 2].

    Richardson et al. 2021, "Encoding in Style" (pSp), eq. 3.
    """
    return 1.0 - F.cosine_similarity(embeddings_a, embeddings_b, dim=1)
