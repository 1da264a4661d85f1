"""Tensors of safetensors files under the names that a model has for them, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hl_scale.base.adapted import BaseModelError


def stream_tensors(directory: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in `model`, tensor) from every safetensors file, one tensor in memory at a time."""
    for name, read in locate_tensors(directory, model):
        yield name, read()


def locate_tensors(directory: Path, model: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield (name in `model`, function that reads the tensor) for every tensor of the files that the model has."""
    # Some repositories ship the same weights a second time in their authors' own layout.
    files = sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if not files:
        raise BaseModelError(
            f"{directory} holds no .safetensors weights (pickled .bin files are not read)\n"
            "  fix: convert them with save_pretrained, or choose a revision that ships safetensors"
        )
    shapes = {name: value.shape for name, value in (*model.named_parameters(), *model.named_buffers())}
    prefix = getattr(model, "base_model_prefix", "") + "."
    for file in files:
        for key in _keys(file):
            name = _match(key, prefix, shapes)
            if name is not None:
                yield name, partial(_read, file, key, shapes[name])


def _read(file: Path, key: str, shape: torch.Size) -> Tensor:
    # Opened anew for each tensor: pages of a file that stays mapped count as memory of the process.
    with safe_open(file, framework="pt") as shard:
        tensor = shard.get_tensor(key)
    if tensor.shape != shape:
        raise BaseModelError(
            f"{file}: {key} has shape {tuple(tensor.shape)}, config.json asks for {tuple(shape)}"
            "\n  fix: weights and config.json must come from the same model"
        )
    return tensor


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as shard:
            return sorted(shard.keys())
    except SafetensorError as error:
        raise BaseModelError(f"{file} is damaged: {error}\n  fix: delete it and fetch the model again") from None


def _match(key: str, prefix: str, known: Container[str]) -> str | None:
    """Name of a stored tensor in the model; None for tensors the model does not use (pooling or unused heads)."""
    renamed = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    for candidate in (renamed, renamed.removeprefix(prefix), prefix + renamed, renamed.replace("language_model.", "")):
        if candidate in known:
            return candidate
    return None
