"""The processes of a run: a single one, or those that torchrun starts.

Each takes its rows of the same global batch, so their number changes a run's speed but not its
result. In a single process, the methods that communicate do nothing.
"""

import gc
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# Before init_process_group: the default arguments of its functions would keep the group alive.
import torch.distributed.nn  # noqa: F401
from torch.nn.parallel import DistributedDataParallel

from crate_mini import UserError
from crate_mini.training.device import choose_device


class Processes:
    """This process among all processes of its run.

    rank: its number, from 0; world: the number of processes; device: its torch.device, a different
    GPU for each of several processes.
    """

    def __init__(self, device):
        """device: the value of --device."""
        self.rank, self.world = rank_and_world()
        if self.world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = choose_device(device)

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

    def connect(self):
        """Start the process group."""
        if self.world == 1:
            return
        backend = "gloo"
        if self.device.type == "cuda":
            backend = "nccl"
            torch.cuda.set_device(self.device)
        # A day: the first process may tokenize a large text while the others wait.
        dist.init_process_group(backend, timeout=timedelta(days=1))

    def wait(self):
        """Return when all processes have reached this call."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value):
        """The first process's value, in all processes."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def add(self, tensor):
        """Replace a tensor by its sum over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)

    def wrap(self, model):
        """The model, with gradients averaged over all processes."""
        return DistributedDataParallel(model) if self.world > 1 else model


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
