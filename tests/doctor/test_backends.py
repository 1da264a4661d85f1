"""Kernels against their definitions, bitsandbytes, and processes that add their numbers up."""

from __future__ import annotations

import sys

import pytest
import torch

from hl_scale.doctor import backends
from hl_scale.kernels import nf4
from hl_scale.sinkhorn import sinkhorn_divergence

GPUS = torch.cuda.device_count()
DEVICE = "cuda" if GPUS else "cpu"


def test_kernels_agree_with_their_definitions():
    assert backends.check_nf4(DEVICE).status == backends.check_sinkhorn(DEVICE).status == "ok"


@pytest.mark.parametrize("value", [0.3, float("nan")])
def test_a_damaged_table_of_nf4_is_found(value):
    table = nf4._pair_table(torch.device("cpu")).view(torch.float32)
    before = table[17].item()
    try:
        table[17] = value
        finding = backends.check_nf4("cpu")
    finally:
        table[17] = before
    assert finding.status == "problem" and "off by up to" in finding.found
    assert backends.check_nf4("cpu").status == "ok"


def test_damaged_block_constants_in_8_bits_are_found():
    table = nf4.dynamic_map(torch.device("cpu"))
    before = table.clone()
    try:
        table[-1] = 0.2  # of the block whose constant is farthest from the mean
        finding = backends.check_nf4("cpu")
    finally:
        table.copy_(before)
    assert finding.status == "problem" and "doubly quantised" in finding.found


@pytest.mark.parametrize("blur", [0.06, float("nan")])
def test_another_divergence_than_the_definition_is_found(monkeypatch, blur):
    monkeypatch.setattr(backends, "sinkhorn_divergence", lambda x, y: sinkhorn_divergence(x, y, blur=0.05) * blur)
    finding = backends.check_sinkhorn("cpu")
    assert finding.status == "problem" and "off by a relative" in finding.found


def test_bitsandbytes_that_cannot_be_imported_is_a_problem(tmp_path, monkeypatch):
    (tmp_path / "bitsandbytes.py").write_text("raise RuntimeError('no library for this CUDA version')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    finding = backends.check_bitsandbytes()
    assert finding.status == "problem" and "no library for this CUDA version" in finding.found


def test_processes_that_do_not_finish_in_time_are_killed():
    finding = backends.check_all_reduce(deadline=0.0)
    assert finding.status == "problem" and "did not finish within 0 s" in finding.found
