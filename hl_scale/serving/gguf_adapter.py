"""Write an adapter as GGUF, which llama.cpp loads beside a GGUF model (`--lora FILE.gguf`).

Such a file says general.type = adapter, adapter.type = lora and adapter.lora.alpha, and holds F32 tensors
blk.N.attn_q.weight.lora_a (r, in) and .lora_b (out, r); llama.cpp scales their product by alpha / r and knows of no
other convention, so alpha = s r here. Files of models whose code rotates neighbouring entries of a head hold q and k
with their rows in that order, and so must B; A is not touched. Rules: convert_lora_to_gguf.py, conversion/llama.py and
src/llama-adapter.cpp of llama.cpp.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hl_scale.base import TaskAdapter
from hl_scale.base.loading import base_reference
from hl_scale.data.durable import flush
from hl_scale.lora import LoraFactors
from hl_scale.serving.export import ExportError, check_finite, generate_factors, run_provenance
from hl_scale.serving.staging import OutputError

if TYPE_CHECKING:
    from hl_scale.engine.run import LoadedRun

_PREFIX = "hl_scale."


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp calls a model type, and whether its files hold q and k in rotated order."""

    name: str
    permutes: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", permutes=True),
    "mistral": Architecture("llama", permutes=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
}
"""transformers' model_type -> llama.cpp's; others rearrange weights in ways that are not implemented here."""


def export_gguf(
    run: LoadedRun,
    condition: str,
    file: str | os.PathLike[str],
    *,
    with_adapter: TaskAdapter | None = None,
    force: bool = False,
) -> Path:
    """Generate the adapter of one condition and write it as GGUF.

    Args:
        run: the trained hypernetwork with its base.
        condition: as for `generate_adapter`.
        file: what to write; must not exist unless ``force``. Appears whole or not at all, after it was read back.
        with_adapter: a task adapter to add.
        force: replace a file that hl_scale wrote earlier.

    Raises:
        ExportError: the gguf package is missing, llama.cpp has no adapters for this architecture or these layers, or
            numbers are not finite.
        OutputError: the file exists and may not be replaced.
        ValueError: an unknown condition.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("writing GGUF needs the gguf package\n  fix: pip install 'hl_scale[gguf]'")
    _check_replaceable(Path(file), force=force)
    parsed, factors = generate_factors(run, condition, with_adapter)
    check_finite(factors)
    config = run.base.model.config
    tensors = gguf_tensors(factors, config)
    facts = {**run_provenance(run, parsed, with_adapter), "base": base_reference(run.config.base)}
    return write_gguf(file, tensors, _architecture(config).name, factors.scale * factors.rank, facts, force=force)


def gguf_tensors(factors: LoraFactors, config: Any) -> dict[str, Tensor]:
    """llama.cpp's names -> A (r, in) and B (out, r), float32 on the CPU, rows of B in llama.cpp's order.

    Args:
        factors: E = 1.
        config: transformers' configuration of the base.

    Raises:
        ExportError: see `export_gguf`.
    """
    import gguf

    architecture = _architecture(config)
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for slot in factors.slots:
        name = names.get_name(f"{slot.path}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ExportError(
                f"llama.cpp has no tensor for {slot.path} in {architecture.name} models\n"
                "  fix: write a merged checkpoint (--merged) and convert that"
            )
        a, b = (side[slot.path][0].detach().float().cpu().contiguous() for side in (factors.a, factors.b))
        if architecture.permutes and slot.module in heads:
            b = neighbouring_rows(b, heads[slot.module])
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = a, b
    return tensors


def neighbouring_rows(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows (heads * size, ...) of each head from (x_0 .. x_n/2, y_0 .. y_n/2) to (x_0, y_0, x_1, y_1, ..).

    transformers rotates entry i of a head with entry i + size / 2, llama.cpp's Llama entry 2i with 2i + 1.
    """
    split = rows.unflatten(0, (heads, 2, rows.shape[0] // heads // 2))
    return split.transpose(1, 2).reshape(rows.shape).contiguous()


def write_gguf(
    file: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    architecture: str,
    alpha: float,
    facts: Mapping[str, Any],
    *,
    force: bool = False,
) -> Path:
    """Write tensors of `gguf_tensors` with llama.cpp's keys and hl_scale's facts, read them back, and give the file its
    name.

    Raises:
        ExportError: alpha is 0, or what is read back is not what was written.
        OutputError: the file exists and may not be replaced.
    """
    import gguf

    if alpha == 0:
        raise ExportError("llama.cpp reads an alpha of 0 as no scaling at all; such an adapter cannot be written")
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", suffix=".tmp", dir=file.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for key, value in facts.items():
            if isinstance(value, str | int | float):
                writer.add_string(f"{_PREFIX}{key}", str(value))
        for key, tensor in tensors.items():
            writer.add_tensor(key, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check_written(temporary, tensors, alpha)
        temporary.chmod(0o644)
        flush(temporary)
        _check_replaceable(file, force=force)
        os.replace(temporary, file)
        flush(file.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _architecture(config: Any) -> Architecture:
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"adapters of {config.model_type} models cannot be written as GGUF (there are {', '.join(ARCHITECTURES)})\n"
            "  fix: write a merged checkpoint (--merged) and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    return ARCHITECTURES[config.model_type]


def _check_written(file: Path, tensors: Mapping[str, Tensor], alpha: float) -> None:
    import gguf

    reader = gguf.GGUFReader(file)
    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    same = found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    stored = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    if not same or stored != float(np.float32(alpha)):
        raise ExportError(f"{file.name} does not hold what was written; nothing was kept\n  fix: look at the disk")


def _check_replaceable(file: Path, *, force: bool) -> None:
    if not os.path.lexists(file):
        return
    if not force:
        raise OutputError(f"{file} exists already\n  fix: choose another file, or ask for it to be replaced")
    if file.is_symlink() or not _written_here(file):
        raise OutputError(
            f"{file} was not written by hl_scale, so it is not replaced\n  fix: choose another file, or remove it"
        )


def _written_here(file: Path) -> bool:
    import gguf

    try:
        return f"{_PREFIX}hl_scale" in gguf.GGUFReader(file).fields
    except (OSError, ValueError, IndexError):
        return False
