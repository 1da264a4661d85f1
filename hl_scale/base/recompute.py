"""Less activation memory: blocks that are recomputed in backward, and MLPs that run over tiles of their tokens.

Generated factors are not leaves: an adapter that a recomputed function merely closes over would have its whole
hypernetwork graph walked once per recomputation. Here the factors (or what they are generated from) are inputs of what
is recomputed. Blocks use torch's non-reentrant checkpoint; tiles are our own function, because each tile's graph has to
be gone before the next one's is made, so it detaches the factors and returns the sum of the tiles' gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hl_scale.base.quantized_linear import AdaptableLinear, Attachment
from hl_scale.kernels import Segments
from hl_scale.lora import FactorSource, Slot


@contextmanager
def attached(
    layers: Sequence[AdaptableLinear], pairs: Sequence[tuple[Tensor, Tensor]], scale: float, segments: Segments | None
) -> Iterator[None]:
    """Layers carry A and B (one pair each) inside the block, and afterwards what they carried before."""
    before = [(layer.adapter, layer.segments) for layer in layers]
    for layer, (a, b) in zip(layers, pairs, strict=True):
        layer.adapter, layer.segments = Attachment(a, b, scale), segments
    try:
        yield
    finally:
        for layer, (adapter, whole) in zip(layers, before, strict=True):
            layer.adapter, layer.segments = adapter, whole
            if layer.shared is not None:
                layer.shared.forget()


class RecomputedBlock:
    """Stands in for a block's `forward`: keeps the block's inputs alone and runs it again in backward.

    Args:
        block: a transformer block.
        path: where it is in the model.
        linears: path -> frozen linear layer of the model.
        offload: keep the hidden states in host memory until backward.
    """

    def __init__(self, block: nn.Module, path: str, linears: Mapping[str, AdaptableLinear], offload: bool) -> None:
        self.forward: Callable[..., Any] = block.forward
        self.path, self.linears, self.offload = path, linears, offload
        self.source: FactorSource | None = None
        self.slots: tuple[Slot, ...] = ()
        self.segments: Segments | None = None
        block.forward = self  # type: ignore[assignment]

    def adapt(self, source: FactorSource | None, segments: Segments | None) -> None:
        """Use these factors from the next pass on, as far as they are of layers of this block."""
        within = () if source is None else tuple(s for s in source.slots if s.path.startswith(self.path + "."))
        self.source, self.slots, self.segments = source if within else None, within, segments

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        source, slots, segments = self.source, self.slots, self.segments
        inputs = [] if source is None else source.inputs(slots)

        def run(hidden: Tensor, *inputs: Tensor) -> Any:
            if source is None:
                return self.forward(hidden, *args, **kwargs)
            layers = [self.linears[slot.path] for slot in slots]
            with attached(layers, source.build(slots, inputs), source.scale, segments):
                return self.forward(hidden, *args, **kwargs)

        if not torch.is_grad_enabled():
            return run(hidden, *inputs)
        with _kept_on_host(hidden) if self.offload else contextlib.nullcontext():
            return checkpoint(run, hidden, *inputs, use_reentrant=False, preserve_rng_state=False)


def _kept_on_host(kept: Tensor) -> Any:
    """Saved tensors that are `kept` wait in (pinned) host memory."""

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if tensor.data_ptr() != kept.data_ptr() or tensor.shape != kept.shape:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=tensor.is_cuda)

    def unpack(held: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return held if isinstance(held, Tensor) else held[1].to(held[0], non_blocking=held[1].is_pinned())

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class TiledMlp:
    """Stands in for an MLP's `forward`: at most `tokens` tokens of each row at a time, recomputed in backward.

    The activations of one tile exist at a time: gate, up and their product are the widest tensors of a block.
    """

    def __init__(self, mlp: nn.Module, tokens: int) -> None:
        self.module, self.tokens = mlp, tokens
        self.forward: Callable[[Tensor], Tensor] = mlp.forward
        self.layers = [module for module in mlp.modules() if isinstance(module, AdaptableLinear)]
        mlp.forward = self  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-2] <= self.tokens:
            return self.forward(x)
        layers = [layer for layer in self.layers if layer.adapter is not None]
        factors = [factor for layer in layers if layer.adapter for factor in (layer.adapter.a, layer.adapter.b)]
        return _Tiles.apply(x, _TileRun(self, layers), *factors)


class _TileRun:
    """Runs one tile with given factors."""

    def __init__(self, mlp: TiledMlp, layers: list[AdaptableLinear]) -> None:
        self.mlp, self.layers = mlp, layers
        self.segments = layers[0].segments if layers else None
        self.scale = layers[0].adapter.scale if layers and layers[0].adapter else 1.0

    def tiles(self, x: Tensor) -> list[slice]:
        starts = range(0, x.shape[-2], self.mlp.tokens)
        return [slice(start, min(start + self.mlp.tokens, x.shape[-2])) for start in starts]

    def __call__(self, x: Tensor, rows: slice, factors: Sequence[Tensor]) -> Tensor:
        segments = None if self.segments is None else self.segments.cut(rows.start, rows.stop)
        with attached(self.layers, list(zip(factors[::2], factors[1::2], strict=True)), self.scale, segments):
            return self.mlp.forward(x)


class _Tiles(torch.autograd.Function):
    """x (..., S, D) and factors -> the MLP's output; gradients of factors are summed over tiles in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: _TileRun, *factors: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x, *factors)
        return torch.cat([run(x[..., rows, :], rows, factors) for rows in run.tiles(x)], dim=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        x, *factors = ctx.saved_tensors
        leaves = [factor.detach().requires_grad_() for factor in factors]
        sums = [torch.zeros_like(f, dtype=torch.promote_types(f.dtype, torch.float32)) for f in factors]
        grad_x = torch.empty_like(x)
        for rows in ctx.run.tiles(x):
            with torch.enable_grad():
                part = x[..., rows, :].detach().requires_grad_()
                y = ctx.run(part, rows, leaves)
            found, *grads = torch.autograd.grad(y, [part, *leaves], grad_y[..., rows, :])
            grad_x[..., rows, :] = found
            for total, gradient in zip(sums, grads, strict=True):
                total.add_(gradient)
        return grad_x, None, *(total.to(f.dtype) for total, f in zip(sums, factors, strict=True))


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> transformer block: elements of the outermost module lists that hold frozen linear layers."""
    blocks: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(block + ".") for block in blocks):
            for number, block in enumerate(module):
                if any(isinstance(inner, AdaptableLinear) for inner in block.modules()):
                    blocks[f"{path}.{number}"] = block
    return blocks


def find_mlps(model: nn.Module) -> list[nn.Module]:
    """Modules with an `up_proj` and a `down_proj` of their own, which take one tensor."""
    names = ("up_proj", "down_proj")
    return [m for m in model.modules() if all(isinstance(getattr(m, name, None), AdaptableLinear) for name in names)]
