"""Batches of a search side by side: the results are those of one after the other, and errors come through."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from data.operator import Downscale
from models.generator import Generator
from search.forward_mode import dual_level
from search.loop import Codes, Found, Optimiser, Problem, Step, search
from search.optimisers import LBFGS, GaussNewton
from search.side_by_side import side_by_side


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "parts", "workers"), [(2, 4, 2), (2, 3, 2), (4, 5, 3), (4, 9, 3), (3, 2, 2)])
def test_parts_share_torchs_threads(threads, parts, workers, two_threads) -> None:
    torch.set_num_threads(threads)
    meet, seen = threading.Barrier(workers, timeout=60), []

    def work(part: int) -> None:
        if part < workers:
            meet.wait()  # passes only if as many are under way at once
        seen.append((part, torch.get_num_threads(), threading.get_ident()))

    side_by_side(work, range(parts), threading.Event())
    assert sorted(part for part, *_ in seen) == list(range(parts))
    assert {share for _, share, _ in seen} == {threads // workers} and len({ident for *_, ident in seen}) == workers
    assert torch.get_num_threads() == threads
    numbers: list[int] = []
    newcomer = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    newcomer.start()
    newcomer.join()
    assert numbers == [threads]


@pytest.mark.parametrize("parts", [[], [7]])
def test_one_part_stays_where_it_is(parts, two_threads) -> None:
    seen: list[tuple[int, int]] = []
    side_by_side(lambda part: seen.append((part, threading.get_ident())), parts, threading.Event())
    assert seen == [(part, threading.get_ident()) for part in parts]


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_is_the_callers(enabled: bool, two_threads) -> None:
    products: list[torch.Tensor] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        side_by_side(lambda part: products.append(torch.ones(2, 2) @ torch.ones(2, 2)), range(2), threading.Event())
    assert [product.dtype for product in products] == 2 * [torch.bfloat16 if enabled else torch.float32]


def test_an_error_stops_the_others(two_threads) -> None:
    stopped, meet, done = threading.Event(), threading.Barrier(2, timeout=60), []

    def work(part: int) -> None:
        meet.wait()
        if part == 0:
            raise ValueError("part 0")
        assert stopped.wait(60)
        time.sleep(0.05)  # for the thread that failed to begin another part, if it did so
        done.append(part)

    with pytest.raises(ValueError, match="part 0"):
        side_by_side(work, range(6), stopped)
    assert done == [1]
    assert torch.get_num_threads() == 2


def search_ten(
    steps: list[Step], interrupt_at: int | None = None, optimiser: Optimiser | None = None, bfloat16: bool = False
) -> Found:
    """Searches for ten faces in five batches; the user interrupts after so many steps."""
    torch.manual_seed(0)
    generator = Generator(32, (16, 16, 16, 8), 16, 16, 2).eval().requires_grad_(False)
    ws = generator.mapping(torch.randn(20, 16))
    target = Downscale(8)(generator.synthesis(ws[:10]).clamp(-1, 1))
    synthesis = generator.synthesis.in_bfloat16() if bfloat16 else generator.synthesis
    problem = Problem(lambda rows, _: Codes(rows["w"]), synthesis, Downscale(8))

    def callback(step: Step) -> None:
        steps.append(step)
        if len(steps) == interrupt_at:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.5)  # nothing goes on meanwhile: one callback at a time

    optimiser = optimiser or LBFGS()
    return search(problem, {"w": ws[10:]}, {}, target, optimiser, 3, callback=callback, at_once=2)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("optimiser", [LBFGS(), GaussNewton(2)], ids=["lbfgs", "gauss-newton"])
def test_a_search_finds_the_same(optimiser: Optimiser, bfloat16: bool, two_threads) -> None:
    steps: list[Step] = []
    together = search_ten(steps, optimiser=optimiser, bfloat16=bfloat16)
    torch.set_num_threads(1)
    alone = search_ten([], optimiser=optimiser, bfloat16=bfloat16)
    assert torch.equal(together.ws, alone.ws) and torch.equal(together.errors, alone.errors)
    assert torch.equal(together.passes, alone.passes)
    for row in range(0, 10, 2):  # each batch's steps in their order, whatever lies between them
        assert [step.number for step in steps if row in step.rows] == [0, 1, 2, 3]


def test_a_search_that_the_user_interrupts_ends(two_threads) -> None:
    steps: list[Step] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            search_ten(steps, interrupt_at=3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(steps) <= 5  # of twenty: one more of each of the two batches that were under way


def test_threads_share_the_level_of_dual_numbers() -> None:
    meet, found = threading.Barrier(2, timeout=60), {}

    def derive(slope: float) -> None:
        with dual_level():
            x = forward_ad.make_dual(torch.tensor(3.0), torch.tensor(slope))
            meet.wait()
            found[slope] = forward_ad.unpack_dual(x * x).tangent.item()
            meet.wait()

    threads = [threading.Thread(target=derive, args=(slope,)) for slope in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {1.0: 6.0, 2.0: 12.0}
    with forward_ad.dual_level():  # which would refuse if the other were still open
        pass
