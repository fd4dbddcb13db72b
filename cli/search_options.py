"""The search: its options, its progress bar, and what the report says of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from search.plan import EPSILONS, INITS, METHODS, STEPS, SearchPlan

if TYPE_CHECKING:
    from search.loop import Callback, SearchResult, SearchState

TRAJECTORY = "trajectory.webp"


def add_search_options(group: argparse._ArgumentGroup) -> None:
    """Adds --search, --method, --init, --epsilon and --save-trajectory to a group of options."""
    add = group.add_argument
    usual = ", ".join(f"{steps} for {name}" for name, steps in STEPS.items())
    add(
        "--search",
        metavar="STEPS",
        type=int,
        default=0,
        help=f"steps of a search that makes the samples explain the input better before projection; usual are {usual} "
        "(default: 0)",
    )
    add(
        "--method",
        choices=METHODS,
        default="amortized",
        help="how to search; published are pulse and mm-pulse with --init random, rls and brgm with --init mean; "
        "wplus-adam is Adam in W+ with no prior (default: amortized)",
    )
    add(
        "--init",
        choices=INITS,
        default="encoder",
        help="where samples start: the encoder's, random faces, or the mean face and about it (default: encoder)",
    )
    add(
        "--epsilon",
        metavar="E",
        type=float,
        help="mean squared residual before projection at which a search has converged (default: "
        f"{EPSILONS['amortized']:g} for amortized, {EPSILONS['pulse']:g} for the others)",
    )
    add("--save-trajectory", action="store_true", help=f"show the search as a moving picture, {TRAJECTORY}")


def read_plan(args: argparse.Namespace) -> SearchPlan | None:
    """Reads the plan of the search from the options; None where nothing is searched.

    Raises:
        ValueError: If they do not go together, in words for the command line.
    """
    try:
        plan = SearchPlan(args.method, args.init, args.search, args.epsilon, args.seed)
    except ValueError as error:
        raise ValueError(f"--search, --method, --init or --epsilon: {error}") from error
    if args.search:
        return plan
    defaults = {"method": "amortized", "init": "encoder", "epsilon": None, "save_trajectory": False}
    for name, default in defaults.items():
        if getattr(args, name) != default:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: expected --search STEPS with it, such as --search {STEPS[args.method]}")
    return None


def summarize_search(plan: SearchPlan, result: SearchResult) -> dict[str, Any]:
    """Says in a report how a face was searched: the plan, and of each sample residual, steps, `nfe` and convergence."""
    columns = {"residual": result.residual, "steps": result.steps, "nfe": result.nfe}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)]
    for row in rows:
        row |= {"residual": float(f"{row['residual']:.3g}"), "converged": row["residual"] <= plan.tolerance}
    notes = {"method": plan.method, "init": plan.init, "steps": plan.steps, "epsilon": plan.tolerance}
    return notes | {"converged": sum(row["converged"] for row in rows), "samples": rows}


@contextmanager
def search_progress(title: str, samples: int, callback: Callback | None = None) -> Iterator[Callback | None]:
    """Shows on the terminal how far a search is, in steps of all N samples.

    Yields:
        The callback for the search, which calls `callback`; None where there is neither a terminal nor a callback.
    """
    if not sys.stderr.isatty():
        yield callback
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit="step", leave=False, mininterval=0) as bar:

        def advance(state: SearchState) -> None:
            if callback is not None:
                callback(state)
            bar.total = samples * state.steps
            left = int(state.done.sum()) * (state.steps - state.number)  # those that are done save the rest
            bar.update((len(state.indices) if state.number else 0) + left)

        yield advance
