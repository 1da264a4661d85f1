"""What each engine accepts, as its documentation or source says; checked without the engine.

Every rule looks at a validated adapter (`data.validation.validate_adapter`: whole, finite, plain LoRA, uniform rank and
alpha) and finds either a problem (the engine refuses the adapter, or answers with a wrong one) or something that its
server must be started with. DoRA, biases, whole modules and ranks by layer never come this far: few engines take them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from hl_scale.data.peft_directory import AdapterFacts

PORTABLE_RANKS = (8, 16, 32, 64, 128)
"""Ranks for which every engine below has its fast kernels, or that it pads to."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""


@dataclass(frozen=True)
class Finding:
    """One thing about an adapter under one engine: a `problem`, or a `note` on how to serve it well."""

    engine: str
    kind: Literal["problem", "note"]
    text: str
    source: str


Check = Callable[[AdapterFacts], str | None]


@dataclass(frozen=True)
class Rule:
    """`check` gives the text of a finding, or None."""

    engine: str
    kind: Literal["problem", "note"]
    check: Check
    source: str


def _exact_keys(facts: AdapterFacts) -> str | None:
    for (path, side), key in facts.keys.items():
        if key != f"base_model.model.{path}.lora_{side}.weight":
            return f"its key {key} must be base_model.model.{path}.lora_{side}.weight, or its numbers are not found"
    return None


def _keys_end_plainly(facts: AdapterFacts) -> str | None:
    for (_, side), key in facts.keys.items():
        if not key.endswith(f".lora_{side}.weight"):
            return f"its key {key} must end with .lora_{side}.weight"
    return None


def _ignores_rslora(facts: AdapterFacts) -> str | None:
    if not facts.config.get("use_rslora") or facts.rank == 1:
        return None
    return (
        f"use_rslora is ignored: the update would be {facts.rank**0.5:.3g} times too weak (--profile portable mends it)"
    )


def _rank_within_vllm(facts: AdapterFacts) -> str | None:
    return f"rank {facts.rank} is above the largest, {VLLM_RANKS[-1]}" if facts.rank > VLLM_RANKS[-1] else None


def _vllm_option(facts: AdapterFacts) -> str | None:
    if not 16 < facts.rank <= VLLM_RANKS[-1]:
        return None
    return f"start it with --max-lora-rank {min(rank for rank in VLLM_RANKS if rank >= facts.rank)} (16 unless given)"


def _sglang_options(facts: AdapterFacts) -> str | None:
    modules = " ".join(sorted({slot.module for slot in facts.slots}))
    return f"loaded while it runs, it needs --max-lora-rank {facts.rank} --lora-target-modules {modules} from the start"


def _target_names(facts: AdapterFacts) -> str | None:
    targets = facts.config.get("target_modules")
    if not isinstance(targets, list):
        return f"target_modules is {targets!r}, but must list names of modules"
    return None


def _adds_tokens(facts: AdapterFacts) -> str | None:
    return "it adds tokens (added_tokens.json)" if (facts.directory / "added_tokens.json").exists() else None


def _every_layer(facts: AdapterFacts) -> str | None:
    """The number of layers is not known here: the highest one that has factors stands for it."""
    last = max(slot.layer for slot in facts.slots)
    for module in sorted({slot.module for slot in facts.slots}):
        layers = {slot.layer for slot in facts.slots if slot.module == module}
        absent = next((layer for layer in range(last + 1) if layer not in layers), None)
        if absent is not None:
            return f"{module} has no factors in layer {absent}: it is left out in all layers then, without a word"
    return None


def _lorax_kernels(facts: AdapterFacts) -> str | None:
    if facts.rank in (16, 32, 64, 128):
        return None
    return f"rank {facts.rank} takes its slower kernels; 16, 32, 64 and 128 (per tensor-parallel rank) the fast ones"


def _zero_alpha(facts: AdapterFacts) -> str | None:
    return "lora_alpha = 0 is read as no scaling at all, not as zero" if facts.scale == 0 else None


_VLLM = "vllm/lora/peft_helper.py, vllm/config/lora.py"
_VLLM_NAMES = "vllm/lora/utils.py: parse_fine_tuned_lora_name"
_SGLANG = "docs.sglang.io/advanced_features/lora.html"
_LORAX = "predibase/lorax: server/lorax_server/adapters/lora.py"
_CONVERT = "llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.h"

RULES = (
    Rule("peft", "problem", _exact_keys, "peft/utils/save_and_load.py: load_state_dict(strict=False)"),
    Rule("vllm", "problem", _keys_end_plainly, _VLLM_NAMES),
    Rule("vllm", "problem", _rank_within_vllm, _VLLM),
    Rule("vllm", "note", _vllm_option, _VLLM),
    Rule("sglang", "problem", _ignores_rslora, "sgl-project/sglang issue 40835; srt/lora/lora.py"),
    Rule("sglang", "problem", _target_names, "sglang/srt/lora/lora_manager.py"),
    Rule("sglang", "problem", _adds_tokens, "sglang/srt/lora/lora_manager.py: validate_new_adapter"),
    Rule("sglang", "note", _sglang_options, _SGLANG),
    Rule("lorax", "problem", _exact_keys, f"{_LORAX}: map_weights_for_model"),
    Rule("lorax", "problem", _every_layer, f"{_LORAX}: LoraWeights.load"),
    Rule("lorax", "note", _lorax_kernels, "predibase/lorax: server/lorax_server/utils/sgmv.py"),
    Rule("llamacpp", "problem", _keys_end_plainly, _CONVERT),
    Rule("llamacpp", "problem", _ignores_rslora, _CONVERT),
    Rule("llamacpp", "problem", _zero_alpha, _CONVERT),
)
"""The table, read from these sources in November 2026."""

ENGINES = tuple(dict.fromkeys(rule.engine for rule in RULES))


def check_engines(facts: AdapterFacts, engines: Collection[str] = ENGINES) -> Iterator[Finding]:
    """What the engines have against a validated adapter, or ask for; nothing where it loads as it is.

    Raises:
        ValueError: an engine that is not in the table.
    """
    unknown = sorted(set(engines) - set(ENGINES))
    if unknown:
        raise ValueError(f"there are no rules for {', '.join(unknown)}\n  fix: choose from {', '.join(ENGINES)}")
    for rule in RULES:
        if rule.engine in engines and (text := rule.check(facts)) is not None:
            yield Finding(rule.engine, rule.kind, text, rule.source)


def portable_rank(rank: int) -> int:
    """The next rank that every engine accepts.

    Raises:
        ValueError: it is larger than all of them.
    """
    for portable in PORTABLE_RANKS:
        if rank <= portable:
            return portable
    raise ValueError(
        f"rank {rank} is larger than {PORTABLE_RANKS[-1]}, the largest that all engines serve\n"
        "  fix: write it with --profile plain, or train with a smaller lora.rank"
    )
