"""Correctness-gated timings of the hot paths against the peers that are installed:

python launch/benchmark.py sinkhorn|lora [--repeats 5] [--threads 1]

Each row times ours and the peer in turn on the same inputs, after a warm-up, and prints medians, the error of both
against float64, and the ratio. A row whose check fails is not timed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hl_scale.kernels import (
    dequantize_nf4,
    generated_lora_linear,
    generated_lora_linear_reference,
    quantize_nf4,
)
from hl_scale.sinkhorn import sinkhorn_divergence

Computation = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Row:
    """One comparison: `ours` and `peer` return the value and gradients that `exact` returns in float64."""

    name: str
    peer_name: str
    ours: Computation
    peer: Computation | None
    exact: list[Tensor]
    tolerance: float


def sinkhorn_rows(generator: torch.Generator) -> list[Row]:
    """Divergence and gradient for x of padded batches of short clouds and of one long pair; blur 0.05."""
    rows = []
    for name, batch, low, high in (("16 pairs of 24 tokens", 16, 24, 24), ("64 pairs of 10-40 tokens", 64, 10, 40)):
        x = torch.randn(batch, high, 640, generator=generator) * 0.06
        y = x + 0.02 * torch.randn(x.shape, generator=generator)
        sizes = torch.randint(low, high + 1, (batch,), generator=generator)
        mask = torch.arange(high)[None] < sizes[:, None]
        rows.append(_sinkhorn_row(f"{name}, D=640", x, y, mask, None))
    x = torch.randn(1, 1024, 640, generator=generator) * 0.06
    y = x + 0.02 * torch.randn(x.shape, generator=generator)
    full = torch.ones(1, 1024, dtype=torch.bool)
    rows.append(_sinkhorn_row("N=M=1024, D=640", x, y, full, None))
    rows.append(_sinkhorn_row("N=M=1024, D=640, 4 MB", x, y, full, 4_000_000))
    return rows


def _sinkhorn_row(name: str, x: Tensor, y: Tensor, mask: Tensor, budget: int | None) -> Row:
    def value(points: Tensor, targets: Tensor) -> list[Tensor]:
        points = points.detach().requires_grad_()
        result = sinkhorn_divergence(points, targets, x_mask=mask, y_mask=mask, memory_budget=budget)
        result.sum().backward()
        return [result.detach(), points.grad]  # type: ignore[list-item]

    peer = None
    if importlib.util.find_spec("geomloss") is not None:
        from geomloss import SamplesLoss

        loss = SamplesLoss("sinkhorn", p=2, blur=0.05, backend="tensorized")
        weights = mask / mask.sum(1, keepdim=True)

        def peer() -> list[Tensor]:
            points = x.detach().requires_grad_()
            result = loss(weights, points, weights, y)
            result.sum().backward()
            return [result.detach(), points.grad]  # type: ignore[list-item]

    exact = value(x.double(), y.double())
    return Row(name, "geomloss", lambda: value(x, y), peer, exact, 1e-3)


def lora_rows(generator: torch.Generator) -> list[Row]:
    """Forward and backward of a 4-bit linear with one adapter per example, against the bare 4-bit matmul."""
    rows = []
    for examples, length, inputs, outputs in ((32, 32, 640, 1024), (8, 128, 640, 2048), (8, 128, 2048, 640)):
        weight = torch.randn(outputs, inputs, generator=generator) * 0.02
        packed, constants = quantize_nf4(weight)
        x = torch.randn(examples, length, inputs, generator=generator)
        a = torch.randn(examples, 8, inputs, generator=generator) / inputs**0.5
        b = torch.randn(examples, outputs, 8, generator=generator) * 0.01
        rows.append(_lora_row(f"E={examples} S={length} {inputs}->{outputs} r=8", packed, constants, [x, a, b]))
    return rows


def _lora_row(name: str, packed: Tensor, constants: object, inputs: list[Tensor]) -> Row:
    def gradients(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = function(*leaves)
        y.sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    def source(dtype: torch.dtype) -> Tensor:
        return dequantize_nf4(packed, constants, dtype)  # type: ignore[arg-type]

    exact = gradients(
        lambda x, a, b: generated_lora_linear_reference(x, source(torch.float32).double(), a, b, 1.0),
        [tensor.double() for tensor in inputs],
    )
    return Row(
        name,
        "bare 4-bit matmul",
        lambda: gradients(lambda x, a, b: generated_lora_linear(x, source, a, b, 1.0), inputs),
        lambda: gradients(lambda x: generated_lora_linear(x, source), inputs[:1]),
        exact,
        1e-4,
    )


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Largest error over the value and gradients, each relative to its largest entry."""
    return max(
        ((f - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() for f, e in zip(found, exact, strict=False)
    )


def median_times(computations: list[Computation], repeats: int) -> list[float]:
    """Median seconds of each, run in turn after one warm-up."""
    samples: list[list[float]] = [[] for _ in computations]
    for repeat in range(repeats + 1):
        for computation, times in zip(computations, samples, strict=True):
            started = time.perf_counter()
            computation()
            if repeat:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in samples]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sinkhorn", "lora"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch",))
    print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {versions}, float32, fwd + bwd\n"
    )
    print(
        "| case | ours, ms | peer | peer, ms | peer / ours | error ours | error peer |\n|---|---|---|---|---|---|---|"
    )
    generator = torch.Generator().manual_seed(0)
    failed = False
    for row in (sinkhorn_rows if arguments.what == "sinkhorn" else lora_rows)(generator):
        own_error = error(row.ours(), row.exact)
        if own_error > row.tolerance:
            print(f"| {row.name} | not timed: error {own_error:.1e} is above {row.tolerance:.0e} | | | | | |")
            failed = True
            continue
        if row.peer is None:
            print(
                f"| {row.name} | {1e3 * median_times([row.ours], arguments.repeats)[0]:.1f} | | | | {own_error:.0e} | |"
            )
            continue
        peer_error = error(row.peer(), row.exact) if arguments.what == "sinkhorn" else float("nan")
        ours, peer = median_times([row.ours, row.peer], arguments.repeats)
        print(
            f"| {row.name} | {1e3 * ours:.1f} | {row.peer_name} | {1e3 * peer:.1f} | {peer / ours:.2f} | "
            f"{own_error:.0e} | {peer_error:.0e} |"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
