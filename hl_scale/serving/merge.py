"""Merge a generated adapter into a 16-bit checkpoint that any engine serves without knowing about adapters.

The base is the dequantised 4-bit base, W = dequantise(NF4), because that is what the adapter was trained on; or, when
asked for, the original 16-bit weights, which adds the quantisation error back: `original` says by how much. Merged
weights are never quantised again, which can erase the adapter. W + s B A is computed in float32 and rounded once.
Tensors are streamed: writing needs the 4-bit model plus one tensor; only the final comparison holds whole models.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.progress import DownloadColumn
from torch import Tensor, nn

from hl_scale.base import AdaptedModel, TaskAdapter
from hl_scale.lora import LoraFactors
from hl_scale.progress import counting_bar
from hl_scale.serving.cards import facts_table
from hl_scale.serving.export import ExportError, generate_factors, run_provenance, write_json
from hl_scale.serving.original import (
    LayerDifference,
    Read,
    layer_difference,
    load_original,
    original_tensors,
    warn_of_differences,
)
from hl_scale.serving.shards import TensorSource, write_sharded
from hl_scale.serving.staging import PROVENANCE_FILE, check_replaceable, staged_directory

if TYPE_CHECKING:
    from hl_scale.engine.run import LoadedRun

MergedDtype = Literal["bfloat16", "float16", "float32"]
MergeBase = Literal["dequantized", "original"]

MAXIMUM_RELATIVE_DIFFERENCE = 0.05
"""Bound on rms(merged - adapted) / rms(adapted) of the probe outputs: rounding stays well below it."""

LARGE_ROUNDING = 0.5
"""Part of the adapter's own effect on the probe outputs from which rounding gives a warning."""

PROBE_TEXTS = (
    "The committee said on Monday that it would publish the report before the end of the year.",
    "She don't know nothing about them books, and he been working there since last summer.",
    "I am not sure whether the film is any good.",
)
"""Sentences on which the reloaded checkpoint is compared with the run's own model."""


@dataclass(frozen=True)
class MergeCheck:
    """How far the reloaded checkpoint is from base and adapter unmerged on the probe sentences, in the compute dtype.

    The base here is that of the merge: the run's own, or the original one. ``output`` says what was compared: logits,
    or the hidden states of an encoder. ``adapter_effect`` is the largest change the adapter itself makes to the same
    numbers: rounding is harmless as long as it stays far below. ``difference_from_run`` is what another base than the
    run's does, relative to the size of the outputs; None where there is no other.
    """

    output: str
    max_difference: float
    relative_difference: float
    top1_agreement: float | None
    adapter_effect: float
    difference_from_run: float | None = None


@dataclass(frozen=True)
class MergedCheckpoint:
    """A merged checkpoint on disk: where it is, its weight files and the comparison that let it through.

    ``differences`` compares quantisation with the adapter, layer by layer; empty unless merged into the original base.
    """

    directory: Path
    files: tuple[str, ...]
    check: MergeCheck
    differences: tuple[LayerDifference, ...] = ()


def merge_adapter(
    run: LoadedRun,
    condition: str,
    directory: str | os.PathLike[str],
    *,
    dtype: MergedDtype = "bfloat16",
    merge_base: MergeBase = "dequantized",
    with_adapter: TaskAdapter | None = None,
    max_shard_bytes: int = 5 * 10**9,
    force: bool = False,
    progress: bool = True,
) -> MergedCheckpoint:
    """Write base + adapter of one condition as a transformers checkpoint.

    Args:
        run: the trained hypernetwork with its base.
        condition: "dialect:Nigerian English", "standard" or "features:FILE.json".
        directory: where to write; must not exist unless ``force``. Appears whole or not at all, and only after
            transformers has loaded it and its outputs were compared with the run's.
        dtype: type of the merged weights.
        merge_base: "dequantized", the 4-bit base that the adapter was trained on, or "original", the weights that were
            quantised, read again from their checkpoint.
        with_adapter: a task adapter to merge as well.
        max_shard_bytes: bound on a weight file.
        force: replace a directory that hl_scale wrote earlier.
        progress: show a progress bar on a terminal.

    Returns:
        The checkpoint and its check.

    Raises:
        ExportError: a weight leaves the range of ``dtype``, or the reloaded model does not reproduce base and adapter.
        ValueError: an unknown condition, or a directory in the way.
    """
    check_replaceable(directory, force=force)
    parsed, factors = generate_factors(run, condition, with_adapter)
    target_dtype = getattr(torch, dtype)
    originals = original_tensors(run.config.base) if merge_base == "original" else {}
    differences: list[LayerDifference] = []
    sources = merged_tensors(run.base, factors, target_dtype, originals, differences.append)
    with staged_directory(directory, force=force) as staging:
        size = sum(source.nbytes for source in sources)
        with counting_bar("merging", size, progress, DownloadColumn()) as advance:
            files = write_sharded(staging, sources, max_shard_bytes, advance)
        _write_configuration(run.base, staging, target_dtype)
        reference = load_original(run.config, _device(run.base)) if merge_base == "original" else None
        check = check_merged(run.base, factors, staging, reference)
        facts = {**run_provenance(run, parsed, with_adapter), "merge_base": merge_base, "dtype": dtype}
        facts |= {"scale": factors.scale}
        facts |= {"check": asdict(check), "differences": [asdict(difference) for difference in differences]}
        write_json(staging / PROVENANCE_FILE, facts)
        (staging / "README.md").write_text(_model_card(facts, check), encoding="utf-8")
    warn_of_differences(differences)
    _warn_of_rounding(check, dtype)
    return MergedCheckpoint(Path(directory), tuple(files), check, tuple(differences))


def merged_tensors(
    base: AdaptedModel,
    factors: LoraFactors,
    dtype: torch.dtype,
    originals: Mapping[str, Read] | None = None,
    differs: Callable[[LayerDifference], None] = lambda difference: None,
) -> list[TensorSource]:
    """Every tensor of the merged checkpoint under its transformers name; tied tensors once.

    Args:
        base: the adapted model; its weights must be whole on this process.
        factors: E = 1.
        dtype: of floating-point tensors.
        originals: name -> the tensor to take instead of the one that the base holds.
        differs: called for each slot with an original weight, when it is produced.
    """
    originals = originals or {}
    linears = base.linears
    scaled = {slot.path: (factors.a[slot.path][0], factors.b[slot.path][0]) for slot in factors.slots}
    sources: list[TensorSource] = []
    done: set[int] = set()
    for path, module in base.model.named_modules():
        prefix = f"{path}." if path else ""
        if path in linears:
            shape = (linears[path].out_features, linears[path].in_features)
            name = f"{prefix}weight"
            produce = _merged_weight(
                path, linears[path], scaled.get(path), factors.scale, dtype, originals.get(name), differs
            )
            sources.append(TensorSource(name, shape, dtype, produce))
        for attribute, tensor in _own_tensors(module, is_linear=path in linears):
            if id(tensor) in done or tensor.device.type == "meta":
                continue
            done.add(id(tensor))
            target = dtype if tensor.is_floating_point() else tensor.dtype
            name = f"{prefix}{attribute}"
            read = originals.get(name, partial(tensor.detach))
            sources.append(TensorSource(name, tuple(tensor.shape), target, _cast(read, target, name)))
    return sources


def check_merged(
    base: AdaptedModel, factors: LoraFactors, directory: Path, reference: AdaptedModel | None = None
) -> MergeCheck:
    """Load a merged checkpoint with transformers and compare it with base and adapter unmerged on `PROBE_TEXTS`.

    Args:
        base: the run's.
        factors: E = 1.
        directory: the checkpoint.
        reference: the base that was merged into, if it is not the run's.

    Raises:
        ExportError: tensors are missing or left over, or the outputs differ by more than rounding.
    """
    merged, inputs = _reload(base, directory)
    keep = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = _forward(reference or base)(**inputs, factors=factors)[keep].float()
        bare = _forward(reference or base)(**inputs, factors=None)[keep].float()
        found = merged(**inputs)
        found = (found.logits if base.has_head else found.last_hidden_state)[keep].float()
        trained = None if reference is None else _forward(base)(**inputs, factors=factors)[keep].float()
    check = MergeCheck(
        output="logits" if base.has_head else "hidden states",
        max_difference=(found - expected).abs().max().item(),
        relative_difference=_relative(found, expected),
        top1_agreement=(found.argmax(-1) == expected.argmax(-1)).float().mean().item() if base.has_head else None,
        adapter_effect=(bare - expected).abs().max().item(),
        difference_from_run=None if trained is None else _relative(found, trained),
    )
    if not check.relative_difference <= MAXIMUM_RELATIVE_DIFFERENCE:
        raise ExportError(
            f"the merged checkpoint does not reproduce base and adapter: {check.output} differ by up to "
            f"{check.max_difference:.3g} ({check.relative_difference:.1%} rms, at most "
            f"{MAXIMUM_RELATIVE_DIFFERENCE:.0%} is rounding); nothing was written"
        )
    return check


def _warn_of_rounding(check: MergeCheck, dtype: str) -> None:
    if check.max_difference > LARGE_ROUNDING * check.adapter_effect:
        logging.getLogger(__name__).warning(
            "rounding to %s changes %s by up to %.2g on probe sentences, the adapter itself by up to %.2g: little of "
            "it may be left in the merged weights; merge in float32, or serve the adapter unmerged",
            dtype, check.output, check.max_difference, check.adapter_effect,
        )  # fmt: skip


def _device(base: AdaptedModel) -> torch.device:
    return next(parameter for parameter in base.model.parameters() if parameter.is_floating_point()).device


def _forward(base: AdaptedModel) -> Callable[..., Tensor]:
    return base.logits if base.has_head else base.hidden_states


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


def _reload(base: AdaptedModel, directory: Path) -> tuple[Any, dict[str, Tensor]]:
    """The merged model as transformers loads it, in the run's dtype, and the probe batch."""
    from transformers import AutoModel, AutoModelForCausalLM

    parameter = next(parameter for parameter in base.model.parameters() if parameter.is_floating_point())
    loader = AutoModelForCausalLM if base.has_head else AutoModel
    loaded: Any = loader.from_pretrained(directory, dtype=parameter.dtype, output_loading_info=True)
    merged, info = loaded
    held = {name for name, tensor in base.model.named_parameters() if tensor.device.type != "meta"}
    held |= {f"{path}.weight" for path in base.linears}
    # What the run's base does not hold either, such as an encoder's unused pooler, cannot be missed.
    missing = sorted(held.intersection(info["missing_keys"]))
    if missing or info["unexpected_keys"]:
        raise ExportError(
            f"transformers does not recognise the merged checkpoint: missing {missing[:3]}, "
            f"unexpected {sorted(info['unexpected_keys'])[:3]}; nothing was written"
        )
    encoded = base.tokenizer(list(PROBE_TEXTS), padding=True, padding_side="right", return_tensors="pt")
    inputs = {key: encoded[key].to(_device(base)) for key in ("input_ids", "attention_mask")}
    return merged.to(_device(base)).eval(), inputs


def _own_tensors(module: nn.Module, is_linear: bool) -> Iterator[tuple[str, Tensor]]:
    """The module's own parameters and persistent buffers; of an adaptable linear only the bias."""
    if is_linear:
        if isinstance(module.bias, Tensor):
            yield "bias", module.bias
        return
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _merged_weight(
    path: str,
    linear: Any,
    factors: tuple[Tensor, Tensor] | None,
    scale: float,
    dtype: torch.dtype,
    read: Read | None,
    differs: Callable[[LayerDifference], None],
) -> Callable[[], Tensor]:
    def produce() -> Tensor:
        held = linear.dense_weight(torch.float32)
        weight = held if read is None else read().to(held)
        if factors is not None:
            a, b = factors
            if read is not None:
                differs(layer_difference(path, weight, held, a, b, scale))
            weight = torch.addmm(weight, b.float(), a.float(), alpha=scale)
        return _in_range(weight.to(dtype), f"{path}.weight")

    return produce


def _cast(read: Read, dtype: torch.dtype, name: str) -> Callable[[], Tensor]:
    return lambda: _in_range(read().to(dtype), name)


def _in_range(tensor: Tensor, name: str) -> Tensor:
    # In parts: the temporary values of a whole embedding would be larger than itself.
    parts = tensor.reshape(-1).split(2**22) if tensor.is_floating_point() else ()
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ExportError(
            f"{name} holds NaN or infinity as {tensor.dtype}; nothing was written\n"
            "  fix: merge in bfloat16, whose range is that of float32; if it is still there, use an earlier checkpoint"
        )
    return tensor


def _write_configuration(base: AdaptedModel, directory: Path, dtype: torch.dtype) -> None:
    """config.json without quantisation, generation_config.json and the tokenizer."""
    config = copy.deepcopy(base.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.architectures = [type(base.model).__name__]
    config.save_pretrained(directory)
    generation = getattr(base.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)


_BASES = {
    "dequantized": "the dequantised base that the adapter was trained on",
    "original": "the original base, not the 4-bit one that the adapter was trained on",
}


def _model_card(facts: dict[str, Any], check: MergeCheck) -> str:
    agreement = "" if check.top1_agreement is None else f", same first token at {check.top1_agreement:.1%} of positions"
    added = f" and {facts['task_adapter']}" if "task_adapter" in facts else ""
    return f"""---
library_name: transformers
tags: [hypernetwork, merged-lora, hl_scale]
---

# {facts["base_model"]} merged with the adapter for {facts["condition"]}{added}

{facts["dtype"]} weights: {_BASES[facts["merge_base"]]}, plus the adapter, rounded once.
On probe sentences the {check.output} differ from those of base and adapter unmerged by at most
{check.max_difference:.3g}{agreement}; the adapter itself moves them by up to {check.adapter_effect:.3g}.
The licence is that of the base model.

{facts_table(facts)}
"""
