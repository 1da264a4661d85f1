"""Load a frozen base model, streaming: each tensor is quantised as it arrives.

Peak memory is the 4-bit model plus one tensor. Weights are read from safetensors only; nothing is unpickled, and Python
shipped with a model runs only when the configuration asks for it at a pinned revision.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.base.adapted import AdaptedModel, BaseModelError
from hl_scale.base.packages import package_directory
from hl_scale.base.quantized_linear import AdaptableLinear, FrozenLinear, QuantizedLinear
from hl_scale.base.random_weights import (
    byte_tokenizer,
    draw_quantized,
    draw_weight,
    is_random,
    parse_name,
    quantized_outline,
    random_config,
)
from hl_scale.base.weight_files import stream_tensors
from hl_scale.config import BaseModelConfig, LoraConfig

_HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab.txt"]


def load_base(base: BaseModelConfig, lora: LoraConfig, device: torch.device | str = "cpu") -> AdaptedModel:
    """Load, quantise and wrap the base model.

    Args:
        base: which model, and how it is held.
        lora: slots to offer.
        device: where tensors end up.

    Returns:
        A frozen `AdaptedModel` in `base.compute_dtype`, in evaluation mode.

    Raises:
        BaseModelError: no such model, no safetensors weights, missing tensors, or slots that do not exist.
    """
    from transformers import AutoConfig, AutoTokenizer

    if is_random(base.model):
        return _load_random(base, lora, device)
    directory = resolve_model(base)
    trust: dict[str, Any] = {"trust_remote_code": base.trust_remote_code}
    if base.trust_remote_code:
        _refuse_foreign_code(directory)
    try:
        config = AutoConfig.from_pretrained(directory, **trust)
        tokenizer = AutoTokenizer.from_pretrained(directory, **trust)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise BaseModelError(
            f"{directory} does not hold a usable model configuration and tokenizer: {reason}\n"
            "  fix: it needs config.json and the tokenizer files next to the .safetensors weights"
        ) from None
    dtype = getattr(torch, base.compute_dtype)
    multimodal = hasattr(config, "text_config")
    model = empty_model(base, config)
    digests = {}
    for name, tensor in stream_tensors(directory, model):
        digests[name] = _digest(tensor)
        _place(model, name, tensor.to(device), dtype, base)
    for name, buffer in model.named_buffers():  # computed from the configuration: scales, rotary frequencies
        digests[name] = _digest(buffer.detach().cpu())
    fingerprint = _fingerprint(base, model.config, tokenizer, digests)
    if tokenizer.pad_token is None:  # padding is masked everywhere, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    model.tie_weights()
    _replace_linears(model, base)
    _check_complete(model, directory)
    _freeze(model)
    model.to(device)
    adapted = AdaptedModel(model, tokenizer, lora, fingerprint, base)
    adapted.from_multimodal = multimodal
    return adapted


def _load_random(base: BaseModelConfig, lora: LoraConfig, device: torch.device | str) -> AdaptedModel:
    """A base of random weights, each tensor drawn and quantised in its turn; see `random_weights`."""
    _, seed = parse_name(base.model)
    config, tokenizer = random_config(base.model), byte_tokenizer()
    model = empty_model(base, config)
    dtype = getattr(torch, base.compute_dtype)
    for name, parameter in list(model.named_parameters()):
        parent, attribute = _parent(model, name)
        key = name.removeprefix(f"{model.base_model_prefix}.")  # the same weights with a head and without
        if base.quantization == "nf4" and attribute == "weight" and _is_quantizable(model, parent):
            shape = (parameter.shape[0], parameter.shape[1])
            layer = QuantizedLinear(*draw_quantized(key, shape, seed, base.double_quantization))
            _swap(model, name.removesuffix(".weight"), layer.to(device))
        else:
            _place(model, name, draw_weight(key, tuple(parameter.shape), seed, dtype).to(device), dtype, base)
    _freeze(model)
    model.to(device)
    # Weights follow from shape and seed, so these stand for them.
    fingerprint = _fingerprint(base, config, tokenizer, {"random weights, version 1, seed": str(seed)})
    return AdaptedModel(model, tokenizer, lora, fingerprint, base)


def outline_base(base: BaseModelConfig, lora: LoraConfig) -> AdaptedModel:
    """The base without its weights: every tensor is on the meta device and has the size it would have.

    It reads config.json alone, from the model's directory or from the hub, and has no tokenizer.

    Raises:
        BaseModelError: there is no configuration to be had, or slots do not exist.
    """
    config = model_config(base)
    model = empty_model(base, config)
    dtype = getattr(torch, base.compute_dtype)
    for path, module in list(model.named_modules()):
        if not _is_quantizable(model, module):
            continue
        if base.quantization == "none":
            _swap(model, path, FrozenLinear(module.weight.to(dtype), module.bias))
            continue
        shape = (module.out_features, module.in_features)
        packed, constants = quantized_outline(shape, base.double_quantization)
        _swap(model, path, QuantizedLinear(packed, constants, module.bias))
    if hasattr(model, "pooler"):
        setattr(model, "pooler", None)  # noqa: B010
    _freeze(model)
    model.to("meta")
    model.tie_weights()
    adapted = AdaptedModel(model, None, lora, "outline", base)
    adapted.from_multimodal = hasattr(config, "text_config")
    return adapted


def model_config(base: BaseModelConfig) -> Any:
    """The transformers configuration of a base, without its weights.

    Raises:
        BaseModelError: it is neither in a local directory nor on a hub that can be reached.
    """
    from transformers import AutoConfig

    if is_random(base.model):
        return random_config(base.model)
    directory = local_directory(base)
    if directory is not None and base.trust_remote_code:
        _refuse_foreign_code(directory)
    try:
        if directory is None:  # code is run from a directory alone, where it was looked at
            return AutoConfig.from_pretrained(base.model, revision=base.revision)
        return AutoConfig.from_pretrained(directory, trust_remote_code=base.trust_remote_code)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"the configuration of base.model = {base.model!r} cannot be read: {str(error).splitlines()[0][:200]}\n"
            "  fix: check the name and the network, or give a directory that holds its config.json (weights are not "
            "needed for this)"
        ) from None


def local_directory(base: BaseModelConfig) -> Path | None:
    """Where the files of a base are, if that is this machine; nothing is fetched from the hub.

    Raises:
        BaseModelError: a path that is no directory, or a package that is not installed.
    """
    if is_random(base.model):
        return None
    is_local = Path(base.model).is_dir() or base.model.startswith(("package:", ".", "/", "~"))
    return resolve_model(base) if is_local else None


def empty_model(base: BaseModelConfig, config: Any) -> Any:
    """The language model of a configuration with parameters on the meta device; buffers are computed."""
    from accelerate import init_empty_weights

    model_class = _model_class(base, config)
    config = getattr(config, "text_config", config)
    with init_empty_weights(include_buffers=False):
        return model_class.from_config(
            config, dtype=getattr(torch, base.compute_dtype), trust_remote_code=base.trust_remote_code
        )


def adapt_model(
    model: Any, tokenizer: Any, base: BaseModelConfig, lora: LoraConfig, fingerprint: str = "in-memory"
) -> AdaptedModel:
    """Wrap a transformers model that is already in memory; its linear layers are replaced in place."""
    _replace_linears(model, base)
    dtype = getattr(torch, base.compute_dtype)
    for parameter in model.parameters():  # not buffers: rotary frequencies stay in float32
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _freeze(model)
    return AdaptedModel(model, tokenizer, lora, fingerprint, base)


def _refuse_foreign_code(directory: Path) -> None:
    """The pinned revision covers the model's own repository; code that it takes from another one is not pinned."""
    for name in ("config.json", "tokenizer_config.json"):
        path = directory / name
        mapping = json.loads(path.read_text(encoding="utf-8")).get("auto_map", {}) if path.is_file() else {}
        flat = [part for value in mapping.values() for part in (value if isinstance(value, list) else [value])]
        foreign = sorted({str(part).split("--")[0] for part in flat if part and "--" in str(part)})
        if foreign:
            raise BaseModelError(
                f"{path} takes Python code from {', '.join(foreign)}, whose revision base.revision does not pin\n"
                "  fix: download model and code into one directory, with auto_map naming local files, and review it"
            )


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def _fingerprint(base: BaseModelConfig, config: Any, tokenizer: Any, digests: dict[str, str]) -> str:
    """Identifies everything that decides a hidden state: weights, settings, quantisation and tokenizer.

    How the weights are spread over files does not count, nor do the defaults of a transformers version.
    """
    settings = config.to_diff_dict()
    for unrelated in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        settings.pop(unrelated, None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    held = [base.quantization, base.double_quantization, base.compute_dtype]
    content = json.dumps([held, settings, digests, words], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def resolve_model(base: BaseModelConfig) -> Path:
    """Local directory of a model: a path, an unpacked package, or a snapshot of a hub repository.

    Raises:
        BaseModelError: none of these can be had; says what was tried.
    """
    if is_random(base.model):
        parse_name(base.model)
        raise BaseModelError(
            f"base.model = {base.model!r} has random weights and no files\n  fix: name a real model for this"
        )
    if base.model.startswith("package:"):
        return package_directory(base.model.removeprefix("package:"), Path(base.cache_directory))
    local = Path(base.model)
    if local.is_dir():
        return local
    if base.model.startswith((".", "/", "~")):
        raise BaseModelError(f"base.model = {base.model!r} is not a directory\n  fix: correct the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                base.model,
                revision=base.revision,
                allow_patterns=[*_HUB_PATTERNS, "*.py"] if base.trust_remote_code else _HUB_PATTERNS,
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"base.model = {base.model!r} is neither a local directory nor a hub model that can be fetched: "
            f"{type(error).__name__}: {str(error).splitlines()[0][:200]}\n"
            "  fix: check the name and the network, log in for gated models, or download it and give the directory"
        ) from None


def base_reference(base: BaseModelConfig) -> str:
    """How an adapter names its base: the hub id, or the absolute path of a local or packaged model."""
    if base.model.startswith("package:") or Path(base.model).is_dir():
        return str(resolve_model(base).resolve())
    return base.model


def _model_class(base: BaseModelConfig, config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    architecture = base.architecture
    if architecture == "auto":
        names = config.architectures or []
        causal = any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names)
        architecture = "causal_lm" if causal else "encoder"
    return AutoModelForCausalLM if architecture == "causal_lm" else AutoModel


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _is_quantizable(model: Any, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module is not model.get_output_embeddings()


def _place(model: Any, name: str, tensor: Tensor, dtype: torch.dtype, base: BaseModelConfig) -> None:
    """Put one tensor where it belongs; the weight of a linear layer becomes an `AdaptableLinear` at once."""
    parent, attribute = _parent(model, name)
    if attribute == "weight" and _is_quantizable(model, parent):
        # Keep the old layer's bias, still empty if it has not arrived; it is placed on the new layer when it does.
        bias = parent.get_parameter("bias") if parent.bias is not None else None
        try:
            layer = _adaptable(tensor, bias, base, dtype)
        except ValueError as error:
            raise BaseModelError(f"{name} cannot be quantised: {error}\n  fix: fetch the model again") from None
        _swap(model, name.removesuffix(".weight"), layer)
        return
    value = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if attribute in parent._buffers:
        parent._buffers[attribute] = value
    else:
        setattr(parent, attribute, nn.Parameter(value, requires_grad=False))


def _adaptable(weight: Tensor, bias: Tensor | None, base: BaseModelConfig, dtype: torch.dtype) -> AdaptableLinear:
    if base.quantization == "nf4":
        return QuantizedLinear.from_dense(weight, bias, base.double_quantization)
    return FrozenLinear(weight.to(dtype), bias)


def _swap(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, name = _parent(model, path)
    setattr(parent, name, module)


def _replace_linears(model: Any, base: BaseModelConfig) -> None:
    """Replace linear layers that hold real weights and were not replaced while streaming."""
    dtype = getattr(torch, base.compute_dtype)
    for path, module in list(model.named_modules()):
        if _is_quantizable(model, module) and module.weight.device.type != "meta":
            _swap(model, path, _adaptable(module.weight.detach(), module.bias, base, dtype))


def _check_complete(model: nn.Module, directory: Path) -> None:
    missing = [n for n, p in model.named_parameters() if p.device.type == "meta" or p.numel() == 0]
    missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise BaseModelError(
            f"{directory} does not hold {len(missing)} tensors the model needs: {', '.join(missing[:5])}"
            "\n  fix: the download is incomplete, or base.architecture does not fit these weights"
        )
    if hasattr(model, "pooler"):
        setattr(model, "pooler", None)  # noqa: B010


def _freeze(model: Any) -> None:
    """No gradients for weights, no dropout."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    model.eval()
