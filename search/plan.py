"""What may be asked of a search, by name; without torch, for command lines that run where there is none."""

from __future__ import annotations

from dataclasses import dataclass

from data.resize import EPSILON

METHODS = ("amortized", "pulse", "mm-pulse", "rls", "brgm", "wplus-adam")
INITS = ("encoder", "random", "mean")
STEPS = {"amortized": 10, "pulse": 100, "mm-pulse": 100, "rls": 500, "brgm": 500, "wplus-adam": 200}
"""Usual numbers of steps; those of the published methods are the published ones."""
EPSILONS = dict.fromkeys(METHODS, EPSILON) | {"amortized": 1e-4}
"""ε by method: the encoder's own samples have about the 1e-3 that others search for."""
PULSE = ("pulse", "mm-pulse")  # those that keep codes on a sphere


@dataclass(frozen=True)
class SearchPlan:
    """What is asked for.

    Attributes:
        method: One of `METHODS`.
        init: One of `INITS`.
        steps: Steps at most; 0 gives the starts as they are.
        epsilon: A search has converged once its residual, mean squared on [0, 1] before back-projection, is at most
            this, or the variance of the input's noise if that is more; None for the method's, see `EPSILONS`.
        seed: Of all random numbers; together with the face it determines them.

    Raises:
        ValueError: If a name is unknown, a number is out of range, or PULSE is to start at the mean.
    """

    method: str = "amortized"
    init: str = "encoder"
    steps: int = 0
    epsilon: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the names and numbers."""
        for name, known in (("method", METHODS), ("init", INITS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.steps < 0 or not 0 < self.tolerance < float("inf") or self.seed < 0:
            raise ValueError(
                f"Expected steps and seed from 0 and a positive epsilon, got {self.steps}, {self.seed}, {self.epsilon}."
            )
        if self.method in PULSE and self.init == "mean":
            raise ValueError(
                "PULSE keeps every code at the length it starts with, and at the mean that is 0; start it from "
                "random or encoder."
            )

    @property
    def tolerance(self) -> float:
        """ε, that of the method if none is given."""
        return EPSILONS[self.method] if self.epsilon is None else self.epsilon
