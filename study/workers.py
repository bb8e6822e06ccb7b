"""The workers of one trial: one process, or several that torch.distributed has joined."""

from __future__ import annotations

import ctypes
from typing import Any

import cv2
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt


def configure_process(cpus: float) -> None:
    """Gives this process its share of a machine: a thread a CPU, and the memory that it once had.

    Else glibc hands every large tensor back to the system when it is freed, and each step faults
    its pages in anew: tests/benchmarks/data.py has what that costs.
    """
    threads = max(1, int(cpus))
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class Workers:
    """What this worker is among its peers; alone, every method gives back what it was given."""

    def __init__(self, device: torch.device) -> None:
        self.is_joined = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.is_joined else 0
        self.world = dist.get_world_size() if self.is_joined else 1
        self.device = device

    def total(self, values: Tensor) -> Tensor:
        """The sum over workers; no gradient flows through it."""
        values = values.detach().clone()
        if self.is_joined:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank."""
        if not self.is_joined:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first worker's value, on all."""
        if not self.is_joined:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def share_buffers(self, task: nn.Module) -> None:
        """The first worker's buffers, the statistics of its batch norms, on all.

        Each worker's come from its own people: without this an epoch's AP would be that of
        several networks, not of the one that is kept.
        """
        if self.is_joined:
            for buffer in task.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Returns when all workers have come here."""
        if self.is_joined:
            dist.barrier()

    def wrap(self, task: nn.Module) -> nn.Module:
        """The task with its gradients averaged over workers."""
        if not self.is_joined:
            return task
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(task, device_ids=ids)
