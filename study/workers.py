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
    """Limit threads to the process's CPUs, and keep freed memory in the heap.

    By default glibc returns every large tensor to the system when it is freed, and each step pays
    for page faults again; tests/benchmarks/data.py measures this.
    """
    threads = max(1, int(cpus))
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class Workers:
    """This worker among its peers; for a single worker every method returns its argument."""

    def __init__(self, device: torch.device) -> None:
        self.is_joined = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.is_joined else 0
        self.world = dist.get_world_size() if self.is_joined else 1
        self.device = device

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over workers; no gradient flows through it."""
        values = values.detach().clone()
        if self.is_joined:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's value, by rank."""
        if not self.is_joined:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Return the first worker's value on every worker."""
        if not self.is_joined:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def share_buffers(self, task: nn.Module) -> None:
        """Copy the first worker's buffers, such as batch norm statistics, to all workers.

        Each worker computes them from its own people. Without this an epoch's AP would be that of
        several networks, not of the one that is saved.
        """
        if self.is_joined:
            for buffer in task.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Wait until all workers have called this."""
        if self.is_joined:
            dist.barrier()

    def wrap(self, task: nn.Module) -> nn.Module:
        """Return the task with its gradients averaged over workers."""
        if not self.is_joined:
            return task
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(task, device_ids=ids)
