"""What several processes agree on before their process group exists, and which group they start."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from crate_mini.training import processes
from crate_mini.training.processes import Processes


@pytest.fixture
def three(monkeypatch):
    """Three processes, as threads that share a store."""
    store, place = dist.HashStore(), threading.local()
    monkeypatch.setattr(processes, "rank_and_world", lambda: (place.rank, 3))
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(store, place.rank, 3)]))

    def make(rank):
        place.rank = rank
        return Processes("cpu")

    with ThreadPoolExecutor(3) as pool:
        yield list(pool.map(make, range(3)))


def test_the_first_prepares_while_the_others_wait_without_a_group(three):
    prepared, may_go_on = [], threading.Event()

    def use(process):
        def prepare():
            assert not dist.is_initialized()
            if process.is_first:
                may_go_on.wait(10)
            prepared.append(process.rank)
            return process.rank

        return process.first_then_others(prepare), len(prepared)

    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(use, process) for process in three]
        assert not any(result.done() for result in results) and not prepared
        may_go_on.set()
        assert [result.result(10) for result in results] == [(0, 3), (1, 3), (2, 3)]
    assert prepared[0] == 0


def test_all_take_the_choice_of_the_first(three):
    def choose(process):
        first = (torch.bfloat16, "as asked") if process.is_first else "another"
        return process.agree(first), process.agree(None if process.is_first else "another")

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(choose, three)) == 3 * [((torch.bfloat16, "as asked"), None)]


@pytest.mark.parametrize(
    "kind, nccl, expected",
    [("cpu", True, "gloo"), ("cuda", True, "nccl"), ("cuda", False, "gloo")],
)
def test_the_group_has_a_normal_timeout_and_knows_its_device(
    kind, nccl, expected, three, monkeypatch
):
    started = []
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: started.append((*a, k)))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    process = three[1]
    process.device = torch.device(kind, 1) if kind == "cuda" else torch.device(kind)
    process.connect()
    [(backend, options)] = started
    assert backend == expected and options["rank"] == 1 and options["world_size"] == 3
    assert "timeout" not in options
    assert options.get("device_id") == (process.device if expected == "nccl" else None)
