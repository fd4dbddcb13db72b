"""What may be asked of an encoder beside the face, without torch."""

from __future__ import annotations

import math


def check_sampling(passes: int | None, temperature: float) -> None:
    """Checks how an encoder is to be used.

    Args:
        passes: Passes of learned feedback, from 0; None means the encoder's own choice.
        temperature: How far the candidates lie from the best guess, from 0.

    Raises:
        ValueError: If a number is out of range.
    """
    if (passes is not None and passes < 0) or not 0 <= temperature < math.inf:
        raise ValueError(f"Expected passes and a temperature from 0, got {passes} and {temperature}.")
