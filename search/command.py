"""The search on infer.py's command line: its options, its progress, and what is told of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.operator import EPSILON
from search.candidates import METHODS, STARTS, Plan
from search.film import Film
from search.loop import Found, Step

FILM = "steps.webp"


def add_search_options(group: argparse._ArgumentGroup) -> None:
    """Adds --refine, --method, --start, --epsilon, --consistency and --save-steps to a group of options."""
    add = group.add_argument
    add(
        "--refine",
        metavar="STEPS",
        type=int,
        default=0,
        help="steps of a search that brings the candidates closer to the input, until they are close enough; 10 are a "
        "good number for ours, each up to three iterations of L-BFGS, 100 for pulse and mm-pulse, 200 for plain, 500 "
        "for rls and brgm (default: 0)",
    )
    add(
        "--method",
        choices=METHODS,
        default="ours",
        help="how to search; published are pulse and mm-pulse with --start random, rls and brgm with --start mean; "
        "plain is Adam in W+ with no prior (default: ours)",
    )
    add(
        "--start",
        choices=STARTS,
        default="encoder",
        help="where candidates start: the encoder's, random faces, or the mean face and about it (default: encoder)",
    )
    add(
        "--epsilon",
        metavar="ERROR",
        type=float,
        default=EPSILON,
        help=f"downscaling error at which a candidate is good enough and its search ends (default: {EPSILON:g})",
    )
    add(
        "--consistency",
        choices=["exact"],
        help="exact: add what the downscaled candidate still lacks of the input, after the search",
    )
    add("--save-steps", action="store_true", help=f"show the search as a film, {FILM}")


def read_plan(args: argparse.Namespace) -> Plan:
    """Reads the plan of the search from the options.

    Args:
        args: With those of `add_search_options` and `data.command.add_encoder_options`, and `seed`.

    Returns:
        The plan.

    Raises:
        ValueError: If they do not go together, in words for the command line.
    """
    if args.method != "ours" and args.refine == 0:
        steps = {"rls": 500, "brgm": 500, "plain": 200}.get(args.method, 100)
        raise ValueError(f"--method {args.method}: expected --refine STEPS with it, such as {steps}")
    if args.save_steps and args.refine == 0:
        raise ValueError("--save-steps: expected a search to show, with --refine STEPS")
    try:
        how = {"seed": args.seed, "passes": args.passes, "temperature": args.temperature}
        return Plan(args.method, args.start, args.refine, args.epsilon, **how)
    except ValueError as error:
        raise ValueError(f"--refine, --method, --start or --epsilon: {error}") from error


def tell_of_search(report: dict[str, Any], args: argparse.Namespace, found: Found | None) -> None:
    """Adds to a report what was asked for beyond the encoder's faces; that of a plain call stays as it is.

    Args:
        report: From `data.report.make_report`; changed in place.
        args: The options.
        found: What the search found, None if there was none.
    """
    report["epsilon"] = args.epsilon
    for candidate in report["candidates"]:
        candidate["within_epsilon"] = candidate["downscaling_error"] <= args.epsilon
    if args.start != "encoder":
        report["start"] = args.start
    if args.consistency:
        report["consistency"] = "exact: the remaining difference to the input was added to the faces, band-limited"
    if found is not None:
        report["search"] = {"method": args.method, "steps": args.refine}
        report["found"] = sum(candidate["within_epsilon"] for candidate in report["candidates"])
        for candidate, steps, passes in zip(
            report["candidates"], found.steps.tolist(), found.passes.tolist(), strict=True
        ):
            candidate |= {"steps": steps, "generator_passes": passes}


def write_latents(found: Found, path: Path) -> None:
    """Writes all that draws the faces again: `ws` (N, L, D), and a search's own maps `noise_0` … (N, 1, H, W)."""
    arrays: dict[str, Any] = {f"noise_{i}": tensor.cpu().numpy() for i, tensor in enumerate(found.noise or [])}
    np.savez(path, ws=found.ws.cpu().numpy(), **arrays)


@contextmanager
def search_bar(title: str, k: int, film: Film | None = None) -> Iterator[Callable[[Step], None] | None]:
    """Shows on the terminal how far a search is, in steps of all candidates.

    Args:
        title: What is searched, such as the picture's name.
        k: Candidates.
        film: Sees the steps as well.

    Yields:
        The callback for the search; None where there is neither a terminal nor a film.
    """
    if not sys.stderr.isatty():
        yield film
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit="step", leave=False, mininterval=0) as bar:

        def advance(step: Step) -> None:
            if film is not None:
                film(step)
            bar.total = k * step.steps
            left = int(step.done.sum()) * (step.steps - step.number)  # those that are done save the rest
            bar.update((len(step.rows) if step.number else 0) + left)

        yield advance
