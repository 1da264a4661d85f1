"""The 4-bit linear layer with one generated adapter per example, against the bare layer and published ways to adapt it.

Peers are the computations that public hypernetwork code does, written out: adapters copied once per token (as row
vectors times (in, r) and (r, out), as in text-to-lora's hooks; as (r, in) and (out, r) times columns, as in
doc-to-lora's packed path) and a batched matmul over equal lengths, for which ragged examples are padded. The bare
layer, ours and bitsandbytes' where installed, is a lower bound: its ratio is below 1.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from hl_scale.benchmark.measure import Computation, Row
from hl_scale.kernels import (
    Segments,
    dequantize_nf4,
    generated_lora_linear,
    generated_lora_linear_reference,
    quantize_nf4,
    workspace,
)
from hl_scale.kernels.generated_lora import Apply, Update

WIDTHS = {
    "cpu": ((640, 1024), (640, 2048), (2048, 640), (4096, 4096)),
    "cuda": ((4096, 4096), (4096, 11008), (11008, 4096)),
}
"""Input and output widths of the layer."""
SHAPES = {
    False: ((8, 512, 16),),
    True: ((8, 512, 16), (8, 512, 8), (8, 512, 64), (32, 128, 16), (4, 2048, 16), (1, 8192, 16)),
}
"""Examples, tokens of each, rank; by whether minutes may be spent."""
COPIES_LIMIT = 3_000_000_000
"""Bytes of per-token copies beyond which that peer is left out."""


def lora_rows(device: str, long: bool) -> Iterator[Row]:
    """Rows for "cpu" (float32) or "cuda" (bfloat16), equal and ragged lengths of the same sum."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for inputs, outputs in WIDTHS[device]:
        weight = torch.randn(outputs, inputs, generator=generator) * 0.02
        for examples, length, rank in SHAPES[long]:
            tokens = examples * length
            cuts = (torch.rand(examples - 1, generator=generator) * (tokens - 1)).long() + 1
            ragged = torch.cat([cuts, torch.tensor([0, tokens])]).sort().values
            equal = torch.arange(examples + 1) * length
            for offsets in (equal, ragged) if examples > 1 else (equal,):
                leaves = [
                    torch.randn(tokens, inputs, generator=generator),
                    torch.randn(examples, rank, inputs, generator=generator) / inputs**0.5,
                    torch.randn(examples, outputs, rank, generator=generator) * 0.01,
                ]
                yield _Case(weight.to(device), [leaf.to(device, dtype) for leaf in leaves], offsets).row()


class _Case:
    """One layer with packed tokens x (T, in), adapters A, B, and segment offsets."""

    def __init__(self, weight: Tensor, leaves: list[Tensor], offsets: Tensor) -> None:
        self.packed, self.constants = quantize_nf4(weight)
        self.weight, self.leaves, self.offsets = weight, leaves, offsets
        self.sizes, self.segments = offsets.diff(), Segments.of(offsets)
        self.equal = bool((self.sizes == self.sizes[0]).all())
        generator = torch.Generator().manual_seed(1)
        self.upstream = torch.randn(len(leaves[0]), weight.shape[0], generator=generator).to(leaves[0])

    def row(self) -> Row:
        outputs, inputs = self.weight.shape
        rank = self.leaves[1].shape[1]
        peers: dict[str, Computation] = {"bare 4-bit layer": lambda: self._run(lambda x, a, b: self._ours(x))}
        if importlib.util.find_spec("bitsandbytes") is not None:
            peers["bare bitsandbytes.matmul_4bit"] = self._bitsandbytes(shared=False)
            peers["bitsandbytes.matmul_4bit and one LoRA for all, as in PEFT"] = self._bitsandbytes(shared=True)
        peers["ours, merged into the weight"] = lambda: self._run(partial(self._ours, apply="merged"))
        peers["batched matmul" if self.equal else "batched matmul, padded"] = lambda: self._run(self._batched)
        if self.leaves[0].is_cuda and rank % 8 == 0:
            peers["two torch._grouped_mm"] = lambda: self._run(self._grouped)
        if self.leaves[0].element_size() * len(self.leaves[0]) * rank * (inputs + outputs) < COPIES_LIMIT:
            peers["adapters copied per token, rows"] = lambda: self._run(self._copied_rows)
            peers["adapters copied per token, columns"] = lambda: self._run(self._copied_columns)
        lengths = "equal" if self.equal else f"{int(self.sizes.min())} to {int(self.sizes.max())} tokens"
        single = self.leaves[0].dtype == torch.float32
        return Row(
            f"{inputs} -> {outputs}, r={rank}, E={len(self.sizes)}, T={len(self.leaves[0])}, {lengths}",
            lambda: self._run(partial(self._ours, apply="lowrank")),
            self._exact(),
            1e-4 if single else 2e-2,
            peers,
            comparable=False,
        )

    def _source(self, dtype: torch.dtype, update: Update | None = None) -> Tensor:
        out = workspace(self.constants.shape, dtype, self.packed.device)
        return dequantize_nf4(self.packed, self.constants, dtype, update=update, out=out)

    def _run(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """y and the gradients of x, A and B (where they have one)."""
        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        y = function(*leaves)
        y.backward(self.upstream.view_as(y))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def _exact(self) -> list[Tensor]:
        leaves = [leaf.double().requires_grad_() for leaf in self.leaves]
        weight = dequantize_nf4(self.packed, self.constants, self.leaves[0].dtype).double()
        y = generated_lora_linear_reference(leaves[0], weight, leaves[1], leaves[2], 1.0, offsets=self.offsets)
        gradients = torch.autograd.grad(y, leaves, self.upstream.double())
        return [y.detach().view(-1, len(weight)), *gradients]

    def _ours(self, x: Tensor, a: Tensor | None = None, b: Tensor | None = None, apply: Apply = "auto") -> Tensor:
        if a is None or b is None:
            return generated_lora_linear(x, self._source)
        return generated_lora_linear(x, self._source, a, b, offsets=self.segments, apply=apply)

    def _batched(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        weight = dequantize_nf4(self.packed, self.constants, x.dtype)
        if self.equal:
            blocks = x.view(len(a), -1, x.shape[1])
            return (blocks @ weight.T + (blocks @ a.mT) @ b.mT).flatten(0, 1)
        mask = (torch.arange(int(self.sizes.max())) < self.sizes[:, None]).to(x.device)
        blocks = x.new_zeros(*mask.shape, x.shape[1]).masked_scatter(mask[..., None], x)
        return (blocks @ weight.T + (blocks @ a.mT) @ b.mT)[mask]

    def _copied_rows(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        weight = dequantize_nf4(self.packed, self.constants, x.dtype)
        sizes = self.sizes.to(x.device)
        copies = a.mT.contiguous().repeat_interleave(sizes, 0), b.mT.contiguous().repeat_interleave(sizes, 0)
        update = torch.bmm(torch.bmm(x[:, None], copies[0]), copies[1])
        return x @ weight.T + update[:, 0]

    def _copied_columns(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        weight = dequantize_nf4(self.packed, self.constants, x.dtype)
        sizes = self.sizes.to(x.device)
        copies = a.repeat_interleave(sizes, 0), b.repeat_interleave(sizes, 0)
        low = torch.bmm(copies[0], x[:, :, None])
        return x @ weight.T + torch.bmm(copies[1], low)[:, :, 0]

    def _grouped(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        weight = dequantize_nf4(self.packed, self.constants, x.dtype)
        ends = self.offsets[1:].to(x.device, torch.int32)
        return x @ weight.T + torch._grouped_mm(torch._grouped_mm(x, a.mT, offs=ends), b.mT, offs=ends)

    def _bitsandbytes(self, shared: bool) -> Computation:
        import bitsandbytes

        packed, state = bitsandbytes.functional.quantize_4bit(
            self.weight.to(self.leaves[0].dtype), quant_type="nf4", compress_statistics=True
        )

        def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            y: Tensor = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
            return y + x @ a[0].T @ b[0].T if shared else y

        return lambda: self._run(layer)
