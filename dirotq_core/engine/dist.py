"""Several processes with a GPU each, started by ``torchrun`` or ``accelerate launch``, on one machine.

Images, and with them calibration inputs, are split over the processes, second moments are summed over all, and each
process solves its share of a block's sites. One process alone is the same with nothing to split.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..calibrate import Calibration

T = TypeVar("T")

#: Processes wait for each other while one of them draws or solves.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """The processes of a run. rank: which one this is. size: how many there are. joined: whether we made the group."""

    rank: int = 0
    size: int = 1
    joined: bool = False

    @staticmethod
    def join() -> World:
        """The world that the environment describes; alone without one."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return World()
        if int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
            raise ValueError("the engine runs on one machine: its processes share the work folder")
        joined = not dist.is_initialized()
        if joined:
            backend = "gloo"
            if torch.cuda.is_available():
                backend = "cpu:gloo,cuda:nccl"
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(backend, timeout=TIMEOUT)
        return World(dist.get_rank(), dist.get_world_size(), joined)

    def leave(self) -> None:
        """End the group if `join` made it."""
        if self.joined:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """`name`, or for "cuda" the GPU of this process."""
        return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}" if self.size > 1 and name == "cuda" else name

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.all_gather_object([None] * self.size, None)

    def mine(self, items: Sequence[T]) -> list[T]:
        """This process's share of `items`: every size-th one."""
        return list(items[self.rank :: self.size])

    def share(self, value: T) -> T:
        """The first process's `value`, for all. Waits for it."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def by_first(self, make: Callable[[], T]) -> T | None:
        """`make()`, called by the first process and returned there, None elsewhere; its error is raised in all.

        Otherwise the others would report a lost connection, and not what is wrong.
        """
        made, problem = None, None
        if self.first:
            try:
                made = make()
            except Exception as error:
                problem = error
        problem = self.share(problem)
        if problem is not None:
            raise problem
        return made

    def split(self, costs: Sequence[float]) -> list[list[int]]:
        """Which of as many items each process takes: the costliest first, each to the process with the least so far."""
        shares: list[list[int]] = [[] for _ in range(self.size)]
        loads = [0.0] * self.size
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            rank = loads.index(min(loads))
            shares[rank].append(i)
            loads[rank] += costs[i]
        return shares

    def gather(self, mine: list[T], shares: Sequence[Sequence[int]]) -> list[T]:
        """Items in order, from what every process made of its share of them (`split`)."""
        made: list[Any] = [mine]
        if self.size > 1:
            made = [None] * self.size
            dist.all_gather_object(made, mine)
        items = {i: item for share, part in zip(shares, made, strict=True) for i, item in zip(share, part, strict=True)}
        return [items[i] for i in range(len(items))]

    def sum_statistics(self, calibration: Calibration) -> None:
        """Let every process have the second moments and the held-out tokens of all."""
        if self.size == 1:
            return
        for plan in calibration.plans:
            moment = calibration.moments[plan.owner]
            tokens = torch.tensor([moment.tokens])
            dist.all_reduce(tokens)
            moment.tokens = int(tokens)
            total = moment.total(calibration.model.get_parameter(f"{plan.owner}.weight").device)
            if moment.tokens:
                dist.all_reduce(total)
            kept: list[Any] = [None] * self.size
            dist.all_gather_object(kept, calibration.kept[plan.owner])
            calibration.kept[plan.owner] = [rows for part in kept for rows in part]
