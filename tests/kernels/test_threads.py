"""Work side by side: in order, one torch thread each, and nothing changed for anybody else."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

from diffsparse_kernels.threads import side_by_side

pytestmark = pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)


def test_results_are_in_order_and_pieces_have_one_thread(threads: int) -> None:
    meet = threading.Barrier(threads, timeout=60)  # passed only by as many pieces at once as there are threads

    def work(piece: int) -> tuple[int, int]:
        meet.wait()
        return piece, torch.get_num_threads()

    assert side_by_side(work, range(2 * threads)) == [(piece, 1) for piece in range(2 * threads)]


def test_all_other_threads_keep_their_number(threads: int) -> None:
    side_by_side(lambda piece: piece, range(3))
    seen = [torch.get_num_threads()]
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [threads, threads]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_results_belong_to_the_callers_mode(threads: int, mode: type) -> None:
    weight = torch.ones(2, requires_grad=True)
    with mode():
        made = side_by_side(lambda piece: weight * piece, range(3))
    assert all(x.is_inference() == (mode is torch.inference_mode) and not x.requires_grad for x in made)


def test_an_error_is_raised_where_it_was_asked_for(threads: int) -> None:
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda piece: 1 // piece, [2, 1, 0])
    assert side_by_side(lambda piece: 1 // piece, [1]) == [1]


def _in_child(answer: object) -> None:
    torch.set_num_threads(2)
    answer.put(side_by_side(lambda piece: 2 * piece, range(4)))  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own(threads: int) -> None:
    side_by_side(lambda piece: piece, range(3))
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(answer,))
    child.start()
    child.join(60)
    assert not child.is_alive()
    assert answer.get() == [0, 2, 4, 6]
