"""The frozen base model whose linear layers accept generated adapters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.base.quantized_linear import AdaptableLinear, SharedInput, gather_with
from hl_scale.base.recompute import RecomputedBlock, TiledMlp, attached, find_blocks, find_mlps
from hl_scale.config import BaseModelConfig, LoraConfig
from hl_scale.kernels import Segments
from hl_scale.lora import FactorSource, Slot

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Names of sibling layers that read the same input, in the order of their calls."""


class BaseModelError(ValueError):
    """A base model that cannot be loaded or adapted as configured."""


class AdaptedModel(nn.Module):
    """A transformers model with frozen `AdaptableLinear` layers, and the slots that receive generated factors.

    Any of its linear layers takes the factors that are handed to it: slots are those of the target modules, for which a
    hypernetwork generates, and a trained adapter that is added to generated ones may be of others.

    Args:
        model: transformers model whose linear layers were replaced.
        tokenizer: its tokenizer, or None in tests.
        lora: which modules are slots, the rank to check against, and how adapters are applied.
        fingerprint: identifies weights and quantisation; keys caches and run provenance.
        base: how activations are saved: recomputed blocks, offload, tiles; all of them off unless given.
        from_multimodal: this is the language model inside a larger checkpoint, where its modules have other paths.

    Raises:
        BaseModelError: a target module does not exist, or the rank is larger than a slot allows.
    """

    def __init__(
        self, model: Any, tokenizer: Any, lora: LoraConfig, fingerprint: str, base: BaseModelConfig | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.from_multimodal = False
        # Path inside the transformers model -> every frozen linear layer.
        self.linears: dict[str, AdaptableLinear] = {
            path: module for path, module in model.named_modules() if isinstance(module, AdaptableLinear)
        }
        self.slots = find_slots(self.linears, lora)
        for layer in self.linears.values():
            layer.apply_as = lora.apply
        self.shared_inputs = _share_inputs(self.linears)
        self.tiled_mlps: list[TiledMlp] = []
        if base is not None and base.mlp_tile_tokens is not None:
            self._tile_mlps(base.mlp_tile_tokens)
        self._blocks: list[RecomputedBlock] = []
        if base is not None and base.gradient_checkpointing:
            for path, block in find_blocks(model).items():
                self._blocks.append(RecomputedBlock(block, path, self.linears, base.offload_activations))

    def _tile_mlps(self, tokens: int) -> None:
        mlps = find_mlps(self.model)
        if not mlps:
            raise BaseModelError(
                f"base.mlp_tile_tokens = {tokens}, but {type(self.model).__name__} has no MLP with up_proj and "
                "down_proj\n  fix: leave base.mlp_tile_tokens out"
            )
        self.tiled_mlps = [TiledMlp(mlp, tokens) for mlp in mlps]

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def context_length(self) -> int:
        """Longest input in tokens."""
        config = self.model.config
        limit = int(config.max_position_embeddings)
        # RoBERTa-family position ids start after the padding index.
        return (
            limit - config.pad_token_id - 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else limit
        )

    @property
    def has_head(self) -> bool:
        """Whether `logits` can be asked for."""
        return self.model.get_output_embeddings() is not None

    @property
    def output_head(self) -> nn.Linear:
        """The frozen layer from states to logits."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise BaseModelError(f"{type(self.model).__name__} has no language-model head, so it has no logits")
        return head

    @property
    def logit_softcap(self) -> float | None:
        """c of c tanh(logits / c), where the model bounds its logits."""
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return None if cap is None else float(cap)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        factors: FactorSource | None = None,
        *,
        noise: Tensor | None = None,
    ) -> Tensor:
        """States after the final norm; the head is not run.

        Args:
            input_ids: (B, T) int64, padded on the right.
            attention_mask: (B, T), 1 for tokens.
            factors: E == B adapters, one per row, or E == 1, or None for the bare base.
            noise: (B, T, D) added to the input embeddings.

        Returns:
            (B, T, D) in the model's dtype.
        """
        return self._states(factors, None, noise, input_ids=input_ids, attention_mask=attention_mask)

    def packed_hidden_states(
        self,
        input_ids: Tensor,
        segments: Segments,
        factors: FactorSource | None = None,
        *,
        adapted: Segments | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """States of texts laid end to end, without padding; each attends to itself alone.

        Args:
            input_ids: (T,) int64.
            segments: one per text.
            factors: E adapters, one for each segment of `adapted`, or E == 1, or None.
            adapted: the texts of each adapter; a text each unless given.
            noise: (T, D) added to the input embeddings.

        Returns:
            (T, D) in the model's dtype.

        Raises:
            BaseModelError: the model is an encoder, which takes padded batches.
        """
        if not self.has_head:
            raise BaseModelError(
                f"{type(self.model).__name__} takes padded batches only\n  fix: set training.packed = false"
            )
        sizes = [rows.stop - rows.start for rows in segments.slices()]
        positions = torch.cat([torch.arange(size, device=input_ids.device) for size in sizes])
        by_condition = None if factors is None or factors.conditions == 1 else adapted or segments
        noise = None if noise is None else noise[None]
        inputs = {"input_ids": input_ids[None], "position_ids": positions[None], "attention_mask": None}
        return self._states(factors, by_condition, noise, **inputs)[0]

    @torch.no_grad()
    def check_packing(self) -> None:
        """Compare two short texts laid end to end with each alone.

        Raises:
            BaseModelError: their states differ, because this model does not keep texts apart by their positions.
        """
        device = next(self.model.parameters()).device
        ids = torch.arange(2, 11, device=device) % int(self.model.config.vocab_size)
        packed = self.packed_hidden_states(ids, Segments((0, 4, len(ids))))
        alone = [self.hidden_states(part[None], torch.ones_like(part[None]))[0] for part in (ids[:4], ids[4:])]
        expected = torch.cat(alone)
        tolerance = 1e-4 if expected.dtype == torch.float32 else 3e-2
        if (packed - expected).abs().max() > tolerance * expected.abs().max():
            raise BaseModelError(
                f"{type(self.model).__name__} does not keep texts that lie end to end apart\n"
                "  fix: set training.packed = false"
            )

    def _states(
        self, factors: FactorSource | None, segments: Segments | None, noise: Tensor | None, **inputs: Any
    ) -> Tensor:
        backbone = self.model.base_model if self.has_head else self.model
        if hasattr(self.model.config, "use_cache"):
            inputs["use_cache"] = False
        if noise is not None:
            embeddings = self.model.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = embeddings + noise.to(embeddings.dtype)
        with self._adapted(factors, segments):
            return backbone(**inputs).last_hidden_state

    def logits(self, input_ids: Tensor, attention_mask: Tensor, factors: FactorSource | None = None) -> Tensor:
        """(B, T, V) next-token scores of a causal model; arguments as `hidden_states`."""
        if not self.has_head:
            raise BaseModelError(f"{type(self.model).__name__} has no language-model head, so it has no logits")
        with self._adapted(factors, None):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        factors: FactorSource | None = None,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
    ) -> list[list[int]]:
        """Greedy continuations of prompts, with a key-value cache.

        Args:
            input_ids: (B, T) int64, padded on the left.
            attention_mask: (B, T), 1 for tokens.
            factors: E == B adapters, one per row, or E == 1, or None for the bare base.
            max_new_tokens: at most so many tokens are added to a row.
            stop_ids: tokens that end a row.

        Returns:
            New tokens of each row, without the one that ended it.

        Raises:
            BaseModelError: the model has no head.
        """
        if not self.has_head:
            raise BaseModelError(f"{type(self.model).__name__} has no language-model head, so it generates no text")
        stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=input_ids.device)
        going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        mask, tokens, positions, cache = attention_mask, input_ids, (attention_mask.cumsum(1) - 1).clamp(min=0), None
        found: list[list[int]] = [[] for _ in range(len(input_ids))]
        with self._adapted(factors, None):
            for _ in range(max_new_tokens):
                output = self.model.base_model(
                    input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                )
                # Of two dimensions: for a strided (B, 1, D), CPUs copy the head's weight for every row.
                logits, cache = self.output_head(output.last_hidden_state[:, -1]), output.past_key_values
                tokens = logits.argmax(-1, keepdim=True)
                going &= ~torch.isin(tokens[:, 0], stops)
                for row in going.nonzero()[:, 0].tolist():
                    found[row].append(int(tokens[row, 0]))
                if not going.any():
                    break
                mask, positions = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1), positions[:, -1:] + 1
        return found

    @contextmanager
    def _adapted(self, factors: FactorSource | None, segments: Segments | None) -> Iterator[None]:
        """Hand each slot its factors for one forward pass; recomputed blocks keep what they need of them."""
        for block in self._blocks:
            block.adapt(factors, segments)
        inside = {slot.path for block in self._blocks for slot in block.slots}
        slots = [] if factors is None else [slot for slot in factors.slots if slot.path not in inside]
        try:
            if factors is None or not slots:
                yield
            else:
                layers = [self.linears[slot.path] for slot in slots]
                with attached(layers, factors.build(slots, factors.inputs(slots)), factors.scale, segments):
                    yield
        finally:
            for block in self._blocks:
                block.adapt(None, None)

    def gather_shared_inputs(self) -> None:
        """Before ZeRO-3 takes the base over: layers that are computed together are gathered together.

        Ranks run different numbers of tiles, so what a tile needs must be gathered before, once for all of them.
        """
        for mlp in self.tiled_mlps:
            gather_with(mlp.module, mlp.layers)
        for shared in self.shared_inputs:
            gather_with(shared.layers[0], shared.layers[1:])

    def checksums(self) -> dict[str, int]:
        """Path -> CRC-32 of each frozen layer's bytes, as this rank holds them."""
        return {path: layer.checksum() for path, layer in self.linears.items()}

    def verify(self, expected: dict[str, int]) -> None:
        """Compare with earlier `checksums`.

        Raises:
            BaseModelError: names the layers whose frozen bytes are no longer what they were.
        """
        changed = [path for path, checksum in self.checksums().items() if expected[path] != checksum]
        if changed:
            raise BaseModelError(
                f"the frozen weights of {len(changed)} layers have changed since they were loaded: "
                f"{', '.join(changed[:3])}\n  fix: what was trained on them is void; load the base anew, and look for "
                "code that writes to it, or for faulty memory"
            )


def _share_inputs(linears: dict[str, AdaptableLinear]) -> list[SharedInput]:
    groups = []
    for path, layer in linears.items():
        parent, _, name = path.rpartition(".")
        for names in SHARED_INPUTS:
            paths = [f"{parent}.{other}" for other in names]
            if name == names[0] and all(other in linears for other in paths):
                members = [linears[other] for other in paths]
                if all(member.in_features == layer.in_features for member in members):
                    groups.append(SharedInput(members))
    return groups


def find_slots(linears: dict[str, AdaptableLinear], lora: LoraConfig) -> tuple[Slot, ...]:
    """Slots of the target modules, in model order.

    Raises:
        BaseModelError: see `AdaptedModel`.
    """
    modules = {path: path.rsplit(".", 1)[-1] for path in linears}
    known = sorted(set(modules.values()))
    for name in lora.target_modules:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BaseModelError(
                f"lora.target_modules names {name!r}, which this base does not have\n"
                f"  fix: {hint}its linear layers are called {', '.join(known)}"
            )
    slots = []
    for path, name in modules.items():
        if name not in lora.target_modules:
            continue
        module = linears[path]
        slot = slot_at(path, module)
        if lora.rank > min(slot.in_features, slot.out_features):
            raise BaseModelError(
                f"lora.rank = {lora.rank} is larger than slot {path} ({slot.in_features} -> {slot.out_features})\n"
                f"  fix: use a rank of at most {min(slot.in_features, slot.out_features)}"
            )
        slots.append(slot)
    return tuple(slots)


def slot_at(path: str, layer: AdaptableLinear) -> Slot:
    """The slot that a linear layer is."""
    return Slot(_layer_index(path), path.rsplit(".", 1)[-1], path, layer.in_features, layer.out_features)


def _layer_index(path: str) -> int:
    """First number in a module path, 0 where there is none."""
    match = re.search(r"\.(\d+)\.", path)
    return int(match.group(1)) if match else 0
