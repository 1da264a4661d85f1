"""Real shapes with random weights, `base.model: random:mistral-7b`: for sizing machines and for smoke tests.

What such a model says means nothing as language. Everything comes from the shape and a seed, without any download:

- A weight is a whole number of steps, uniform in -127 .. 127 (0 twice as often), from a generator seeded by (seed,
  tensor name): every rank draws the same tensors, in any order.
- Linear layers are quantised to NF4 piece by piece as they are drawn, so the model is never held in 16 or 32 bits. With
  256 levels and 128 possible block maxima, the nearest code is one table lookup; bytes equal those of `quantize_nf4`.
- The step gives a layer's outputs the size of its inputs, sqrt(3 / in) being the largest weight. It is a power of two,
  so that scaling a weight by its block's maximum rounds in the same way whatever the step.
- Tokens are the bytes of a text.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hl_scale.base.adapted import BaseModelError
from hl_scale.kernels import BlockConstants, quantize_nf4
from hl_scale.kernels.nf4 import BLOCK_SIZE, NESTED_BLOCK_SIZE, double_quantize

PREFIX = "random:"
SHAPES: dict[str, dict[str, Any]] = {
    "mistral-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768,
    },
    "llama-70b": {  # config.json of meta-llama/Llama-2-70b-hf
        "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096,
    },
    "mistral-tiny": {
        "vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    },
}  # fmt: skip
"""Keyword arguments of transformers' MistralConfig by name (without a window, its blocks are those of Llama);
`mistral-tiny` is for tests."""

_LARGEST = 127
_PIECE = 1 << 16
"""Weights drawn and quantised at a time: they stay in a core's cache."""
_PAD, _BOS, _BYTES = 0, 1, 3


def is_random(model: str) -> bool:
    """Whether `base.model` asks for random weights."""
    return model.startswith(PREFIX)


def parse_name(model: str) -> tuple[str, int]:
    """Shape name and seed of `random:NAME` (seed 0) or `random:NAME:SEED`.

    Raises:
        BaseModelError: unknown name, or a seed that is no whole number.
    """
    name, _, seed = model.removeprefix(PREFIX).partition(":")
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"did you mean {PREFIX}{near[0]}? " if near else ""
        known = ", ".join(PREFIX + known for known in SHAPES)
        raise BaseModelError(f"base.model = {model!r} is unknown\n  fix: {hint}random weights exist for {known}")
    if seed and not seed.isdecimal():
        raise BaseModelError(
            f"base.model = {model!r} has a seed that is no whole number\n  fix: {PREFIX}{name}, or {PREFIX}{name}:1"
        )
    return name, int(seed or 0)


def random_config(model: str) -> Any:
    """The transformers configuration of a shape; its causal model has a head of its own."""
    from transformers import MistralConfig

    name, _ = parse_name(model)
    return MistralConfig(
        **SHAPES[name], sliding_window=None, rms_norm_eps=1e-5, tie_word_embeddings=False, pad_token_id=_PAD,
        bos_token_id=_BOS, eos_token_id=2, architectures=["MistralForCausalLM"],
    )  # fmt: skip


def byte_tokenizer() -> Any:
    """A tokenizer without a vocabulary file: <s>, then one token for each UTF-8 byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())  # what the byte-level step writes for the 256 bytes
    vocabulary = {"<pad>": _PAD, "<s>": _BOS, "</s>": 2, **{symbol: _BYTES + i for i, symbol in enumerate(symbols)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", _BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def draw_weight(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A whole tensor: matrices drawn as the module says; vectors, which are the scales of norms, are all ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    weight = torch.empty(math.prod(shape), dtype=dtype)
    step = _step(name, shape)
    for start, levels in _draw_levels(name, math.prod(shape), seed):
        weight[start : start + len(levels)] = levels * step
    return weight.view(shape)


def draw_quantized(
    name: str, shape: tuple[int, int], seed: int, double_quantization: bool = True
) -> tuple[Tensor, BlockConstants]:
    """`quantize_nf4(draw_weight(...))`, without ever holding the weight."""
    numel = math.prod(shape)
    if numel % BLOCK_SIZE:
        return quantize_nf4(draw_weight(name, shape, seed), double_quantization)
    packed = torch.empty(numel // 2, dtype=torch.uint8)
    maxima = torch.empty(numel // BLOCK_SIZE, dtype=torch.uint8)
    table = _nearest_codes().view(-1)
    for start, levels in _draw_levels(name, numel, seed):
        blocks = levels.view(-1, BLOCK_SIZE)
        largest = blocks.abs().amax(dim=1)
        rows = (largest.int() << 8) + (_LARGEST + 1)
        codes = torch.index_select(table, 0, (rows[:, None] + blocks).view(-1))
        packed[start // 2 : (start + len(levels)) // 2] = (codes[::2] << 4) | codes[1::2]
        maxima[start // BLOCK_SIZE : (start + len(levels)) // BLOCK_SIZE] = largest.to(torch.uint8)
    absmax = maxima.float().mul_(_step(name, shape))
    return packed, double_quantize(shape, absmax) if double_quantization else BlockConstants(shape, absmax)


def quantized_outline(shape: tuple[int, int], double_quantization: bool) -> tuple[Tensor, BlockConstants]:
    """Packed bytes and constants of a quantised (out, in) weight on the meta device: sizes without content."""
    numel = math.prod(shape)
    blocks = -(-numel // BLOCK_SIZE)
    packed = torch.empty(-(-numel // 2), dtype=torch.uint8, device="meta")
    if not double_quantization:
        return packed, BlockConstants(shape, torch.empty(blocks, device="meta"))
    codes = torch.empty(blocks, dtype=torch.uint8, device="meta")
    nested = torch.empty(-(-blocks // NESTED_BLOCK_SIZE), device="meta")
    return packed, BlockConstants(shape, codes, nested, torch.empty((), device="meta"))


def _draw_levels(name: str, numel: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(start, int8 levels) pieces of a tensor in order. A draw of 64 random bits makes eight levels."""
    key = hashlib.sha256(f"{seed}|{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    for start in range(0, numel, _PIECE):
        count = min(_PIECE, numel - start)
        words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        levels = words.view(torch.int8)[:count]
        yield start, levels.masked_fill_(levels == -_LARGEST - 1, 0)  # without a partner of the other sign


def _step(name: str, shape: tuple[int, ...]) -> float:
    """The power of two nearest to sqrt(3 / in) / 127; rows of embeddings have entries of size 1."""
    fan_in = 1 if "embed" in name else shape[-1]
    return 2.0 ** round(math.log2(math.sqrt(3.0 / fan_in) / _LARGEST))


@cache
def _nearest_codes() -> Tensor:
    """(128, 256) int NF4 codes of a level (plus 128) in a block whose largest magnitude is the row's number."""
    table = torch.empty(_LARGEST + 1, 256, dtype=torch.uint8)
    others = BLOCK_SIZE - 1
    levels = torch.arange(-(-256 // others) * others) - 128
    for largest in range(_LARGEST + 1):
        blocks = levels.clamp(-largest, largest).view(-1, others)
        blocks = torch.cat((torch.full((len(blocks), 1), largest), blocks), dim=1)
        packed, _ = quantize_nf4(blocks.float(), double_quantization=False)
        codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1, BLOCK_SIZE)[:, 1:]
        table[largest] = codes.reshape(-1)[:256]
    return table
