"""Batches of a search in threads: the results are those of one after the other, and errors come through."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from data.operator import Downscale
from models.generator import Generator
from search.loop import Codes, Problem, Search, SearchResult, SearchState
from search.optimizers import LBFGS
from search.parallel import run_in_threads


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

    run_in_threads(work, range(parts), threading.Event())
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
    run_in_threads(lambda part: seen.append((part, threading.get_ident())), parts, threading.Event())
    assert seen == [(part, threading.get_ident()) for part in parts]


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_is_the_callers(enabled: bool, two_threads) -> None:
    products: list[torch.Tensor] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        run_in_threads(lambda part: products.append(torch.ones(2, 2) @ torch.ones(2, 2)), range(2), threading.Event())
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
        run_in_threads(work, range(6), stopped)
    assert done == [1]
    assert torch.get_num_threads() == 2


def search_ten(states: list[SearchState], interrupt_at: int | None = None, bfloat16: bool = False) -> SearchResult:
    """Searches for ten faces in five batches; the user interrupts after so many steps."""
    torch.manual_seed(0)
    generator = Generator(32, (16, 16, 16, 8), 16, 16, 2).eval().requires_grad_(False)
    ws = generator.mapping(torch.randn(20, 16))
    target = Downscale(8)(generator.synthesis(ws[:10]).clamp(-1, 1))
    synthesis = generator.synthesis.in_bfloat16() if bfloat16 else generator.synthesis
    problem = Problem(lambda rows, _: Codes(rows["w"]), synthesis, Downscale(8))

    def callback(state: SearchState) -> None:
        states.append(state)
        if len(states) == interrupt_at:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.5)  # nothing goes on meanwhile: one callback at a time

    return Search(problem, {"w": ws[10:]}, {}, LBFGS()).run(target, 3, callback=callback, batch_size=2)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_search_finds_the_same(bfloat16: bool, two_threads) -> None:
    states: list[SearchState] = []
    together = search_ten(states, bfloat16=bfloat16)
    torch.set_num_threads(1)
    alone = search_ten([], bfloat16=bfloat16)
    assert torch.equal(together.ws, alone.ws) and torch.equal(together.nfe, alone.nfe)
    for sample in range(10):  # each sample's steps come in their order, whatever comes between them
        assert [state.number for state in states if sample in state.indices] == [0, 1, 2, 3]


def test_a_search_that_the_user_interrupts_ends(two_threads) -> None:
    states: list[SearchState] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            search_ten(states, interrupt_at=3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(states) <= 5  # of twenty: one more of each of the two batches that were under way
