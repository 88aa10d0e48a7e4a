"""Several processes agree, share out and gather; one alone is all of them."""

import multiprocessing
import os
import signal
import socket
import time

import pytest

from ftexp import ranks


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
def test_a_step_keeps_its_rows(batch, accumulation, processes):
    made = ranks.per_process(batch, accumulation, processes)
    if batch * accumulation % processes:
        assert made is None
        return
    size, passes = made
    assert size * passes * processes == batch * accumulation
    assert size <= batch  # of memory a process needs no more than one alone
    if accumulation % processes == 0:
        assert size == batch


def test_one_process_is_all(monkeypatch):
    assert (ranks.count(), ranks.rank()) == (1, 0)
    assert ranks.agreed("x") == "x"
    assert ranks.mine([1, 2, 3]) == [1, 2, 3]
    assert ranks.gathered({1: 2}) == {1: 2}
    assert not ranks.deserted()
    assert ranks.told("end", patient=True) == []
    ranks.meet()
    ranks.tell("end", "word")


@pytest.mark.parametrize("moment", range(4))
def test_a_process_that_leaves_word_while_it_is_looked_for_has_not_deserted(monkeypatch, moment):
    """Whichever look comes before its last act, and whichever after."""

    class Store:
        looks = 0

        def lives(self, *_):
            self.looks += 1
            return self.looks <= moment

        def check(self, _):
            return not self.lives()

        def get(self, _):
            return b"1"

    store = Store()
    monkeypatch.setattr(ranks, "_store", store)
    monkeypatch.setattr(ranks, "_lives", store.lives)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    assert not ranks.deserted()


def _member(number, port, found, scene):
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    ranks.PATIENCE_SECONDS = 1.0
    ranks.join()
    found.put((number, scene()))


def _sharing():
    whole = ranks.gathered({n: n * n for n in ranks.mine(list(range(7)))})
    return ranks.agreed(f"from {ranks.rank()}"), whole, ranks.count()


def _words():
    """Process 1 leaves word and goes, process 2 is silent until it is killed."""
    if ranks.rank() == 1:
        ranks.tell("end", "one")
        ranks.tell("left", "")
        return None
    if ranks.rank() == 2:
        time.sleep(1.5)  # longer than the first one's patience
        os.kill(os.getpid(), signal.SIGKILL)
    silent = ranks.told("end", patient=False)
    before = ranks.deserted()
    try:
        ranks.told("end", patient=True)
    except ranks.Lost as error:
        return silent, before, str(error), ranks.deserted()


def _run(scene, answers):
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    members = [context.Process(target=_member, args=(n, port, found, scene)) for n in range(3)]
    for member in members:
        member.start()
    told = dict(found.get(timeout=120) for _ in range(answers))
    for member in members:
        member.join(60)
    return told


@pytest.mark.slow
def test_three_processes_agree_and_share():
    told = _run(_sharing, 3)
    assert told == dict.fromkeys(range(3), ("from 0", {n: n * n for n in range(7)}, 3))


@pytest.mark.slow
def test_a_silent_process_and_a_dead_one_are_told_apart():
    told = _run(_words, 2)
    assert told[0] == (None, False, "process 2 of the trial is gone", True)
