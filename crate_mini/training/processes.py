"""The processes of a run: a single one, or those that torchrun starts.

Each takes its rows of the same global batch, so their number changes a run's speed but not its
result. In a single process, the methods that communicate do nothing.
"""

import gc
import os
import pickle
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# Before init_process_group: the default arguments of its functions would keep the group alive.
import torch.distributed.nn  # noqa: F401
from torch.nn.parallel import DistributedDataParallel

from crate_mini import UserError
from crate_mini.training.device import choose_device

PREPARING = timedelta(days=7)  # the first process may tokenize a large text while the others wait


class Processes:
    """This process among all processes of its run.

    rank: its number, from 0; world: the number of processes; device: its torch.device, a different
    GPU for each of several processes. They first meet at a store, a server of keys and values that
    waits as long as it takes; `connect` then starts the process group, which exchanges gradients.
    """

    def __init__(self, device):
        """device: the value of --device."""
        self.rank, self.world = rank_and_world()
        if self.world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            place = os.environ.get("LOCAL_RANK", self.rank % torch.cuda.device_count())
            device = f"cuda:{place}"
        self.device = choose_device(device)
        self.n_agreed = 0
        if self.world > 1:
            self.store = next(dist.rendezvous("env://"))[0]
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)

    @property
    def is_first(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, batch_size):
        """Rows of the global batch for each process. Raises UserError if they do not divide."""
        if batch_size % self.world:
            fitting = max(1, batch_size // self.world) * self.world
            raise UserError(
                f"--batch-size {batch_size} does not divide among {self.world} processes; "
                f"try --batch-size {fitting}."
            )
        return batch_size // self.world

    def first_then_others(self, prepare):
        """The result of prepare(), which the first process calls before all others do.

        All return together. There is no process group yet, whose timeout a long wait would break.
        """
        if not self.is_first:
            self.store.wait(["prepared"], PREPARING)
        result = prepare()
        if self.world > 1:
            self.store.set("prepared" if self.is_first else f"prepared {self.rank}", "")
            others = [f"prepared {rank}" for rank in range(1, self.world)]
            self.store.wait(others, PREPARING)
        return result

    def connect(self):
        """Start the process group: NCCL between GPUs, Gloo between CPUs or where NCCL is absent."""
        if self.world == 1:
            return
        place = dict(rank=self.rank, world_size=self.world, store=self.store)
        if self.device.type == "cuda" and dist.is_nccl_available():
            dist.init_process_group("nccl", device_id=self.device, **place)
        else:
            dist.init_process_group("gloo", **place)

    def wait(self):
        """Return when all processes have reached this call."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value):
        """The first process's value, in all processes; it needs no process group."""
        if self.world == 1:
            return value
        self.n_agreed += 1
        key = f"agreed {self.n_agreed}"
        if self.is_first:
            self.store.set(key, pickle.dumps(value))
        return pickle.loads(self.store.get(key))

    def add(self, tensor):
        """Replace a tensor by its sum over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def wrap(self, model):
        """The model, with gradients averaged over all processes.

        torch.compile belongs around it: it then splits the backward pass where gradients travel.
        """
        if self.world == 1:
            return model
        return DistributedDataParallel(model)


def rank_and_world():
    """(rank, number of processes) from torchrun's environment; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def keep_process():
    """Put back what a run changes in its process, which may be a notebook's.

    These are the state of the random generators, and environment variables that torch sets.
    """
    variables = set(os.environ)
    used = torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if used else []):
            yield
    finally:
        for name in set(os.environ) - variables:
            del os.environ[name]


def disconnect():
    """End the process group, if there is one.

    The last reference to it must be gone: its threads end with it, and one that frees a tensor
    while Python exits would abort the process.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
