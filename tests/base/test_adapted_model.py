"""Generated adapters on the frozen base: one per row, gradients to the factors alone, recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hl_scale.base import AdaptedModel, QuantizedLinear
from hl_scale.lora import LoraFactors

Saved = Callable[[str], Path]
Load = Callable[..., AdaptedModel]


def factors(base: AdaptedModel, conditions: int, rank: int = 4) -> LoraFactors:
    generator = torch.Generator().manual_seed(conditions)
    a = {s.path: torch.randn(conditions, rank, s.in_features, generator=generator) / 8 for s in base.slots}
    b = {s.path: torch.randn(conditions, s.out_features, rank, generator=generator) / 4 for s in base.slots}
    for factor in (*a.values(), *b.values()):
        factor.requires_grad_()
    return LoraFactors(base.slots, a, b, 0.5)


def batch(rows: int = 3) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, 67, (rows, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 5, 7, 4][:rows])[:, None]).long()
    return torch.where(mask.bool(), ids, 1), mask


def snapshot(base: AdaptedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in base.state_dict().items()}


@pytest.mark.parametrize("kind", ["gemma", "llama", "roberta"])
@torch.no_grad()
def test_each_row_of_a_batch_is_adapted_by_its_own_factors_alone(saved: Saved, load: Load, kind: str) -> None:
    base = load(saved(kind), kind)
    generated, (ids, mask) = factors(base, 3), batch()
    together, bare = base.hidden_states(ids, mask, generated), base.hidden_states(ids, mask)
    for row in range(3):
        length = int(mask[row].sum())
        alone = base.hidden_states(ids[row : row + 1, :length], mask[row : row + 1, :length], generated.select(row))
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-5)
        assert (together[row, :length] - bare[row, :length]).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
@torch.no_grad()
def test_generation_is_the_token_by_token_argmax_of_logits_for_each_row_with_its_adapter(
    saved: Saved, load: Load, checkpointing: bool
) -> None:
    base = load(saved("gemma"), "gemma", gradient_checkpointing=checkpointing)
    # Let what is attended to decide the next token, and not the last token alone, which gives the same one for ever.
    base.model.get_input_embeddings().weight.mul_(0.3)
    base.model.lm_head.weight = torch.nn.Parameter(torch.randn(67, 32, generator=torch.Generator().manual_seed(0)))
    generated, (ids, mask) = replace(factors(base, 3), scale=1.0), batch()
    expected = []
    for row in range(3):
        tokens = ids[row][mask[row].bool()]
        start = len(tokens)
        for _ in range(12):  # beyond the sliding window
            scores = base.logits(tokens[None], torch.ones_like(tokens)[None], generated.select(row))
            tokens = torch.cat((tokens, scores[0, -1:].argmax(-1)))
        expected.append(tokens[start:].tolist())
    assert all(len(set(tokens)) >= 5 for tokens in expected), expected
    left = torch.stack([row.roll(9 - int(m.sum())) for row, m in zip(ids, mask, strict=True)])
    left_mask = mask.flip(1)
    assert base.generate(left, left_mask, generated, max_new_tokens=12) == expected
    stop = expected[2][4]
    ended = [row[: row.index(stop)] if stop in row else row for row in expected]
    assert len(ended[2]) == 4 and len(ended[0]) == 12
    assert base.generate(left, left_mask, generated, max_new_tokens=12, stop_ids=[stop]) == ended
    assert all(module.adapter is None for module in base.linears.values())


class BatchedProducts(TorchDispatchMode):
    """Sizes of the operands of batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "bmm" in str(func):
            self.sizes.update(size for operand in args if isinstance(operand, Tensor) for size in operand.shape)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_generation_does_not_repeat_the_head_for_each_row(saved: Saved, load: Load) -> None:
    base, (ids, mask) = load(saved("gemma"), "gemma"), batch()
    vocabulary = len(base.output_head.weight)
    products = BatchedProducts()
    with products:
        base.generate(ids, mask, max_new_tokens=3)
    assert vocabulary not in products.sizes


@torch.no_grad()
def test_one_adapter_is_shared_by_all_rows(saved: Saved, load: Load) -> None:
    base = load(saved("llama"))
    shared = factors(base, 1)
    repeated = shared.select(torch.tensor([0, 0, 0]))
    torch.testing.assert_close(base.logits(*batch(), shared), base.logits(*batch(), repeated), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_adapted_model_equals_one_whose_weights_were_changed(saved: Saved, load: Load) -> None:
    base = load(saved("llama"), quantization="none")
    generated = factors(base, 1)
    expected = base.logits(*batch(), generated)
    for slot in base.slots:
        update = generated.scale * generated.b[slot.path][0] @ generated.a[slot.path][0]
        base.linears[slot.path].weight.add_(update)
    torch.testing.assert_close(base.logits(*batch()), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_evaluation_leaves_no_adapter_behind(saved: Saved, load: Load) -> None:
    base = load(saved("llama"))
    bare = base.logits(*batch())
    base.logits(*batch(), factors(base, 3))
    assert all(module.adapter is None for module in base.linears.values())
    assert torch.equal(base.logits(*batch()), bare)


def test_training_leaves_every_byte_of_the_base_unchanged_and_without_gradient(saved: Saved, load: Load) -> None:
    base = load(saved("gemma"), "gemma")
    before, generated = snapshot(base), factors(base, 3)
    base.hidden_states(*batch(), generated).square().mean().backward()
    assert all(factor.grad is not None and (factor.grad != 0).any() for factor in generated.a.values())
    assert all(factor.grad is not None and (factor.grad != 0).any() for factor in generated.b.values())
    assert all(parameter.grad is None for parameter in base.parameters())
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["gemma", "llama", "roberta"])
def test_gradient_checkpointing_changes_no_state_and_no_gradient(saved: Saved, load: Load, kind: str) -> None:
    results = []
    for recompute in (False, True):
        base = load(saved(kind), kind, gradient_checkpointing=recompute)
        generated = factors(base, 3)
        hidden = base.hidden_states(*batch(), generated)
        hidden[batch()[1].bool()].square().mean().backward()
        results.append([hidden, *(f.grad for f in (*generated.a.values(), *generated.b.values()))])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_gradient_checkpointing_does_recompute(saved: Saved, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def forwards(recompute: bool) -> int:
        base, calls = load(saved("llama"), gradient_checkpointing=recompute), []
        base.linears[base.slots[0].path].register_forward_hook(lambda *_: calls.append(1))
        base.hidden_states(*batch(), factors(base, 3)).sum().backward()
        return len(calls)

    assert (forwards(False), forwards(True)) == (1, 2)


def test_a_number_of_adapters_that_fits_no_row_is_refused(saved: Saved, load: Load) -> None:
    base = load(saved("llama"))
    with pytest.raises(ValueError, match=r"2 adapters need x of shape \(2, S, in\)"):
        base.hidden_states(*batch(3), factors(base, 2))


def layer(seed: int, double: bool = True, bias: bool = True) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(10, 130, generator=generator)
    return QuantizedLinear.from_dense(weight, torch.randn(10, generator=generator) if bias else None, double)


@pytest.mark.parametrize("double", [False, True])
def test_a_quantised_layer_round_trips_through_its_state_dict(double: bool) -> None:
    source, target = torch.nn.Sequential(layer(0, double)), torch.nn.Sequential(layer(1, double))
    x = torch.randn(3, 130)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict({name: value.clone() for name, value in source.state_dict().items()})
    assert torch.equal(source(x), target(x))


def test_a_state_dict_without_block_constants_is_refused() -> None:
    state = {name: value for name, value in layer(0).state_dict().items() if not name.startswith("constants.")}
    with pytest.raises(RuntimeError, match=r'Missing key.*"constants.absmax"'):
        layer(1).load_state_dict(state)


def test_casting_a_module_leaves_packed_bytes_and_block_constants_alone() -> None:
    module = layer(0)
    packed, absmax, offset = module.packed.clone(), module.constants.absmax, module.constants.offset
    nested, weight = module.constants.nested_absmax, module.dense_weight(torch.float32)
    module.bfloat16()
    assert module.bias is not None and module.bias.dtype == torch.bfloat16
    assert module.packed.dtype == torch.uint8 and torch.equal(module.packed, packed)
    for now, before in zip(
        (module.constants.absmax, module.constants.nested_absmax, module.constants.offset),
        (absmax, nested, offset),
        strict=True,
    ):
        assert now is not None and before is not None and now.dtype == before.dtype and torch.equal(now, before)
    assert torch.equal(module.dense_weight(torch.float32), weight)
    assert not [name for name, _ in module.named_buffers()]
