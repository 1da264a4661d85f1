"""Correctness-gated timings of the hot paths against the peers that are installed; needs torch alone."""

from hl_scale.benchmark.measure import run_benchmark

__all__ = ["run_benchmark"]
