"""What all adaptations of a frozen base have in common, and where in its blocks they attach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hl_scale.adaptations.settings import AdaptationSettings
from hl_scale.base import AdaptableLinear, AdaptedModel
from hl_scale.base.recompute import find_blocks


class AdaptationError(ValueError):
    """An adaptation that cannot be built, attached or loaded as asked."""


@dataclass(frozen=True)
class Block:
    """The places of one transformer block.

    Attributes:
        attention: computes queries, keys and values, and adds earlier keys and values from `past_key_values`.
        attention_output: returns the attention sublayer's output (B, T, D), after its projection to the hidden size and
            before the skip connection.
        feed_forward_output: likewise of the feed-forward sublayer.
        hidden_size: D.
        heads, head_size: of keys and values; grouped queries have more heads of their own.
    """

    attention: nn.Module
    attention_output: nn.Module
    feed_forward_output: nn.Module
    hidden_size: int
    heads: int
    head_size: int


# Decoders (Gemma, Llama, Mistral, Qwen): in Gemma a norm follows each of these outputs before the skip connection.
# The MLP's output is taken at the MLP and not at its down_proj, which runs inside a recomputed tile where there is one.
# Encoders (BERT, RoBERTa): the dense layer, because the module around it adds the skip connection itself.
_LAYOUTS = (
    ("self_attn", "self_attn.k_proj", "self_attn.o_proj", "mlp"),
    ("attention.self", "attention.self.key", "attention.output.dense", "output.dense"),
)


def transformer_blocks(base: AdaptedModel) -> list[Block]:
    """The blocks of a base, in model order.

    Raises:
        AdaptationError: blocks of an architecture whose places are not known.
    """
    found = find_blocks(base.model)
    blocks = [block for module in found.values() if (block := _places(module)) is not None]
    if not found or len(blocks) < len(found):
        raise AdaptationError(
            f"{type(base.model).__name__} has no blocks of a known layout (self_attn with k_proj and o_proj beside "
            "mlp, or attention.self beside attention.output and output)\n"
            "  fix: use a Gemma, Llama, Mistral, Qwen, BERT or RoBERTa model, or a LoRA"
        )
    return blocks


def _places(block: nn.Module) -> Block | None:
    for layout in _LAYOUTS:
        try:
            attention, key, attention_output, feed_forward_output = (block.get_submodule(path) for path in layout)
        except AttributeError:
            continue
        size = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
        if isinstance(key, AdaptableLinear) and isinstance(attention_output, AdaptableLinear) and size:
            width, hidden = key.out_features, attention_output.out_features
            return Block(attention, attention_output, feed_forward_output, hidden, width // size, size)
    return None


class Adaptation(nn.Module, ABC):
    """A trained change to what a frozen base computes. Its parameters are its own; the base's are left alone.

    Args:
        base: the base it is for; sizes and the fingerprint are taken from it, the model itself is not kept.
        settings: sizes.
        condition_size: C, entries of a condition; None where `conditional` is False.
    """

    kind: ClassVar[str]
    conditional: ClassVar[bool] = False

    def __init__(self, base: AdaptedModel, settings: AdaptationSettings, condition_size: int | None) -> None:
        super().__init__()
        self.settings = settings
        self.condition_size = condition_size
        self.base_fingerprint = base.fingerprint

    @property
    def parameter_count(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @contextmanager
    def attached(self, base: AdaptedModel, conditions: Tensor | None = None) -> Iterator[None]:
        """Inside the context `base.hidden_states`, `logits` and `generate` are adapted; after it, all is as before.

        Several adaptations may be attached at once, and factors given to those calls are applied too; but a slot
        carries one LoRA, so that factors of the same slots replace a `lora` for that call. Where the base recomputes
        its blocks (base.gradient_checkpointing), `backward` must run inside the context too: outside of it torch finds
        that what it computes again is not what it was.

        Args:
            base: the base this was built for.
            conditions: (E, C), one per row of the batch or one for all; ignored unless `conditional`.

        Raises:
            AdaptationError: another base, or conditions that are missing or have another shape.
        """
        if base.fingerprint != self.base_fingerprint:
            raise AdaptationError(
                f"this {self.kind} adaptation was built for the base {self.base_fingerprint[:12]}, not for "
                f"{base.fingerprint[:12]}\n  fix: use the base it was trained on, with the same quantisation"
            )
        if self.conditional:
            self._check_conditions(conditions)
        with ExitStack() as stack:
            self._attach(base, conditions, stack)
            yield

    @abstractmethod
    def _attach(self, base: AdaptedModel, conditions: Tensor | None, stack: ExitStack) -> None:
        """Change the base; whatever undoes it is pushed on `stack` at once."""

    def initialize(self, base: AdaptedModel, seed: int) -> None:
        """Initial values that depend on what the base computes; most have none."""

    def _check_conditions(self, conditions: Tensor | None) -> None:
        shape = None if conditions is None else tuple(conditions.shape)
        if shape is None or len(shape) != 2 or shape[1] != self.condition_size or shape[0] == 0:
            raise AdaptationError(
                f"a {self.kind} adaptation needs conditions (E, {self.condition_size}), got {shape}\n"
                "  fix: give one condition vector per row of the batch, or one for all"
            )
