"""What a process gives back to the system."""

from __future__ import annotations

import gc

import pytest
import torch

from hl_scale.engine.memory import resident_bytes, return_freed

BLOCK = 1 << 14  # float32 numbers: 64 KiB, below what glibc maps apart


@pytest.mark.skipif(resident_bytes() == 0, reason="the system does not say what a process holds")
def test_freed_blocks_go_back_when_asked_and_stay_until_then():
    blocks = [torch.ones(BLOCK) for _ in range(3000)]
    last = blocks.pop()  # what lies below it cannot go back by itself
    size, full = len(blocks) * 4 * BLOCK, resident_bytes()
    del blocks
    gc.collect()
    assert resident_bytes() > full - 0.2 * size
    return_freed()
    assert resident_bytes() < full - 0.8 * size
    assert last.sum() == BLOCK
