"""Clouds spread over two gloo ranks: the value and the gradient of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hl_scale.sinkhorn import sharded_sinkhorn_divergence, sinkhorn_divergence

SHARES = {"x": (5, 18), "y": (11, 6)}


def clouds() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(sum(share), 3, generator=generator, dtype=torch.float64) for share in SHARES.values())
    return x, y + 0.5


def _own(rank: int) -> list[torch.Tensor]:
    parts = [points.split(share)[rank] for points, share in zip(clouds(), SHARES.values(), strict=True)]
    return [part.clone().requires_grad_() for part in parts]


def _measure(rank: int, rendezvous: str, budget: int | None, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    x, y = _own(rank)
    value = sharded_sinkhorn_divergence(x, y, blur=0.2, memory_budget=budget)
    (3 * value).backward()
    torch.save([value.detach(), x.grad, y.grad], f"{results}.{rank}")
    for arguments, message in (
        (dict(x=x, y=y, blur=(0.2, 0.3)[rank]), "ranks of the group differ"),
        (dict(x=x, y=y, blur=-1.0), "blur is -1.0"),
        (dict(x=x * 1e30, y=y), "overflow float32"),
        (dict(x=(x, x[:, :2])[rank], y=(y, y[:, :2])[rank]), "ranks of the group differ in D"),
        (dict(x=(x, x * torch.nan)[rank], y=y), ("another rank", "x holds NaN")[rank]),
    ):
        with pytest.raises(ValueError, match=message):
            sharded_sinkhorn_divergence(**arguments)
    dist.destroy_process_group()


@pytest.mark.parametrize("budget", [None, 600])
def test_two_ranks_give_the_value_and_gradient_of_one_and_refuse_together(tmp_path: Path, budget: int | None) -> None:
    mp.spawn(_measure, (f"file://{tmp_path}/rendezvous", budget, f"{tmp_path}/result"), nprocs=2)
    x, y = (points.requires_grad_() for points in clouds())
    expected = sinkhorn_divergence(x, y, blur=0.2)
    (3 * expected).backward()
    results = [torch.load(f"{tmp_path}/result.{rank}", weights_only=True) for rank in (0, 1)]
    for value, _, _ in results:
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    for position, points in ((1, x), (2, y)):
        gathered = torch.cat([result[position] for result in results])
        torch.testing.assert_close(gathered, points.grad, rtol=1e-9, atol=1e-14)
