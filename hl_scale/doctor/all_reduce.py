"""One rank of the loopback all-reduce: python -m hl_scale.doctor.all_reduce BACKEND RANK RANKS RENDEZVOUS SECONDS."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def main(backend: str, rank: int, ranks: int, rendezvous: str, seconds: float) -> None:
    """Add up 1 to `ranks`; ends with status 1 and one line if the sum is wrong.

    Args:
        backend: gloo or nccl.
        rank, ranks: this process among all.
        rendezvous: path of a file that does not exist yet.
        seconds: longest wait for the others.
    """
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend, init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds)
    )
    numbers = torch.full((4096,), rank + 1.0, device=device)
    dist.all_reduce(numbers)
    expected = ranks * (ranks + 1) / 2
    wrong = numbers[numbers != expected]
    if len(wrong):
        sys.exit(f"the sum of 1 to {ranks} came out as {wrong[0].item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
