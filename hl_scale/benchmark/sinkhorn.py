"""Sinkhorn divergence and its gradient: short clouds as in a training step, long ones, and one too long for peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hl_scale.benchmark.measure import Computation, Row
from hl_scale.sinkhorn import packed_sinkhorn_divergence, sinkhorn_divergence

BLUR = 0.05


def sinkhorn_rows(device: str, long: bool) -> Iterator[Row]:
    """Rows for "cpu" or "cuda"; blur 0.05, debiased, gradient in x."""
    generator = torch.Generator().manual_seed(0)
    if device == "cpu":
        for batch, low, high in ((16, 24, 24), (64, 10, 40)):
            yield _ragged_row(generator, batch, low, high, 640, device)
        for points, dimension in ((1024, 640), (4096, 640), (4096, 4096)):
            yield from _long_rows(generator, points, dimension, torch.float32, device)
        yield from _pot_rows(generator)
        if long:
            yield _huge_row(generator, 32768, 640, 700_000_000)
    else:
        yield _ragged_row(generator, 64, 100, 512, 4096, device)
        for points in (8192, 32768):
            yield from _long_rows(generator, points, 4096, torch.bfloat16, device)


def _differentiated(divergence: Any, x: Tensor) -> list[Tensor]:
    """The values of divergence(x) and the gradient of their sum."""
    points = x.detach().requires_grad_()
    values = divergence(points)
    values.sum().backward()
    assert points.grad is not None
    return [values.detach().view(-1), points.grad]


def _geomloss() -> Any:
    """GeomLoss's divergence with its costs stored, or None where it is not installed."""
    if importlib.util.find_spec("geomloss") is None:
        return None
    from geomloss import SamplesLoss

    return SamplesLoss("sinkhorn", p=2, blur=BLUR, backend="tensorized")


def _peers(x: Tensor, y: Tensor, device: str) -> dict[str, Computation]:
    """Installed peers for one pair."""
    peers: dict[str, Computation] = {}
    loss = _geomloss()
    if loss is not None:
        peers["geomloss"] = partial(_differentiated, lambda points: loss(points.float(), y.float()), x)
    if device == "cuda" and importlib.util.find_spec("flash_sinkhorn") is not None:
        from flash_sinkhorn import SamplesLoss as FlashLoss

        flash = FlashLoss(loss="sinkhorn", p=2, blur=BLUR, half_cost=True, debias=True)
        peers["flash-sinkhorn"] = partial(_differentiated, lambda points: flash(points, y), x)
    return peers


def _clouds(
    generator: torch.Generator, count: int, dimension: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Points of length about 1, as hidden states over sqrt(D) are, and shuffled noisy copies of them."""
    x = torch.randn(count, dimension, generator=generator) / dimension**0.5
    noise = torch.randn(count, dimension, generator=generator) / dimension**0.5
    y = 0.9 * x[torch.randperm(count, generator=generator)] + 0.4 * noise
    return x.to(device, dtype), y.to(device, dtype)


def _long_rows(
    generator: torch.Generator, count: int, dimension: int, dtype: torch.dtype, device: str
) -> Iterator[Row]:
    """One pair: all costs kept, a tenth of what the peer takes for its costs, and little more than tiles at work."""
    x, y = _clouds(generator, count, dimension, dtype, device)
    exact = _differentiated(partial(sinkhorn_divergence, y=y.double(), blur=BLUR), x.double())
    peers = _peers(x, y, device)
    tenth, little = int(0.1 * 7 * count**2 * 4), int(4e6 if device == "cpu" else 256e6)
    for budget in (None, tenth, little):
        if budget == little and little > tenth / 2:
            continue
        label = "all costs kept" if budget is None else f"{budget / 1e6:.0f} MB"
        ours = partial(_differentiated, partial(sinkhorn_divergence, y=y, blur=BLUR, memory_budget=budget), x)
        name = f"N=M={count}, D={dimension}, {str(dtype).split('.')[1]}, {label}"
        yield Row(name, ours, exact, 2e-3 if dtype == torch.float32 else 1e-2, peers)


def _ragged_row(generator: torch.Generator, batch: int, low: int, high: int, dimension: int, device: str) -> Row:
    """Packed clouds of `low` to `high` points; the peer gets them padded, with their weights."""
    sizes = torch.randint(low, high + 1, (batch,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    x = torch.randn(int(offsets[-1]), dimension, generator=generator).to(device) / dimension**0.5
    y = 0.9 * x + 0.4 * torch.randn(x.shape, generator=generator).to(device) / dimension**0.5
    mask = (torch.arange(high) < sizes[:, None]).to(device)
    weights = mask / mask.sum(1, keepdim=True)

    def padded(points: Tensor) -> Tensor:
        return points.new_zeros(batch, high, dimension).masked_scatter(mask[..., None], points)

    peers: dict[str, Computation] = {}
    loss = _geomloss()
    if loss is not None:
        targets = padded(y)
        peers["geomloss, padded"] = partial(
            _differentiated, lambda points: loss(weights, padded(points), weights, targets), x
        )

    def packed(points: Tensor, targets: Tensor) -> Tensor:
        return packed_sinkhorn_divergence(points, targets, offsets, offsets, blur=BLUR)

    exact = _differentiated(lambda points: packed(points, y.double()), x.double())
    tokens = f"{low}-{high}" if low < high else str(low)
    name = f"{batch} pairs of {tokens} tokens, D={dimension}"
    return Row(name, partial(_differentiated, lambda points: packed(points, y), x), exact, 2e-3, peers)


def _huge_row(generator: torch.Generator, count: int, dimension: int, budget: int) -> Row:
    """A cloud and its translate by t: S = |t|^2 / 2, gradient -t / N, whatever the cloud."""
    x = torch.randn(count, dimension, generator=generator) / dimension**0.5
    shift = torch.randn(dimension, generator=generator) / dimension**0.5
    y = x[torch.randperm(count, generator=generator)] + shift
    exact = [shift.double().square().sum().view(1) / 2, (-shift.double() / count).expand(count, -1)]
    ours = partial(_differentiated, partial(sinkhorn_divergence, y=y, blur=BLUR, memory_budget=budget), x)
    return Row(f"N=M={count}, D={dimension}, {budget / 1e6:.0f} MB", ours, exact, 2e-2, once=True)


def _pot_rows(generator: torch.Generator) -> Iterator[Row]:
    """Entropic OT without debiasing until marginals are met, forward only: POT's streaming solver has no other."""
    if importlib.util.find_spec("ot") is None:
        return
    from ot.bregman import empirical_sinkhorn2

    x, y = _clouds(generator, 2048, 64, torch.float32, "cpu")
    blur, tolerance = 0.3, 1e-3

    def ours(x: Tensor, y: Tensor, tolerance: float) -> list[Tensor]:
        value = sinkhorn_divergence(x, y, blur=blur, debias=False, tolerance=tolerance, memory_budget=2_000_000)
        return [value.view(1)]

    def pot() -> list[Tensor]:
        # POT's cost is the whole squared distance, and its error is checked every tenth update.
        value, _ = empirical_sinkhorn2(
            x.numpy(), y.numpy(), reg=2 * blur**2, isLazy=True, batchSize=512, stopThr=tolerance, log=True
        )
        return [torch.as_tensor(value).view(1) / 2]

    exact = ours(x.double(), y.double(), 1e-5)
    name = f"OT of N=M=2048, D=64, marginals within {tolerance:.0e}, forward only"
    yield Row(name, partial(ours, x, y, tolerance), exact, 1e-2, {"POT, lazy": pot}, comparable=False)
