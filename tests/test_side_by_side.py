"""Batches of a search side by side: the results are those of one after the other, and errors come through."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from data.operator import Downscale
from models.generator import Generator
from search.loop import Codes, Found, Problem, Step, search
from search.optimisers import LBFGS
from search.side_by_side import side_by_side

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def never() -> None:
    raise AssertionError("stopped, though nothing went wrong")


def test_parts_share_torchs_threads(two_threads) -> None:
    meet, seen = threading.Barrier(2, timeout=60), []

    def work(part: int) -> None:
        meet.wait()  # passes only if two parts are under way at once
        seen.append((part, torch.get_num_threads(), threading.current_thread().name))

    side_by_side(work, range(4), CPU, never)
    assert sorted(part for part, *_ in seen) == [0, 1, 2, 3]
    assert {threads for _, threads, _ in seen} == {1} and len({name for *_, name in seen}) == 2
    assert torch.get_num_threads() == 2
    numbers: list[int] = []
    newcomer = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    newcomer.start()
    newcomer.join()
    assert numbers == [2]


@pytest.mark.parametrize(("parts", "device"), [([7], CPU), ([7, 8, 9], torch.device("meta"))])
def test_one_after_the_other_where_that_is_better(parts, device, two_threads) -> None:
    seen: list[tuple[int, int]] = []
    side_by_side(lambda part: seen.append((part, threading.get_ident())), parts, device, never)
    assert seen == [(part, threading.get_ident()) for part in parts]


def test_an_error_stops_the_others(two_threads) -> None:
    stopped, ended = threading.Event(), []

    def work(part: int) -> None:
        if part == 0:
            raise ValueError("part 0")
        assert stopped.wait(60)
        ended.append(part)

    with pytest.raises(ValueError, match="part 0"):
        side_by_side(work, range(6), CPU, stopped.set)
    assert len(ended) < 5  # what had not begun was not done
    assert torch.get_num_threads() == 2


def search_five(steps: list[Step], stop_at: int | None = None) -> Found:
    """Searches for five faces, each a batch of its own; the user interrupts after so many steps."""
    torch.manual_seed(0)
    generator = Generator(32, (16, 16, 16, 8), 16, 16, 2).eval().requires_grad_(False)
    ws = generator.mapping(torch.randn(10, 16))
    target = Downscale(8)(generator.synthesis(ws[:5]).clamp(-1, 1))
    problem = Problem(lambda rows, _: Codes(rows["w"]), generator.synthesis, Downscale(8))

    def callback(step: Step) -> None:
        steps.append(step)
        if len(steps) == stop_at:
            raise KeyboardInterrupt

    return search(problem, {"w": ws[5:]}, {}, target, LBFGS(), 3, callback=callback, at_once=1)


def test_a_search_finds_the_same(two_threads) -> None:
    steps: list[Step] = []
    together = search_five(steps)
    torch.set_num_threads(1)
    alone = search_five([])
    assert torch.equal(together.ws, alone.ws) and torch.equal(together.errors, alone.errors)
    assert torch.equal(together.passes, alone.passes)
    for row in range(5):  # each row's steps in their order, whatever lies between them
        assert [step.number for step in steps if step.rows.tolist() == [row]] == [0, 1, 2, 3]


def test_a_search_that_is_interrupted_ends(two_threads) -> None:
    steps: list[Step] = []
    with pytest.raises(KeyboardInterrupt):
        search_five(steps, stop_at=3)
    assert len(steps) <= 5  # one more of the batch beside it, or two, of twenty
