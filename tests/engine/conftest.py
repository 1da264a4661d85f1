"""Gradients of the first step in float64, from a plain transformers model with hooks: an oracle for every way to train.

The frozen weights are those the quantised base holds, and the hypernetwork starts from the same draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hl_scale.base import load_base
from hl_scale.conditions import typology
from hl_scale.config import Config
from hl_scale.data.corpus import load_corpus
from hl_scale.data.sampling import GlobalSampler
from hl_scale.engine.alignment import token_lengths
from hl_scale.engine.targets import tokenize
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.objectives.alignment import AlignmentObjective


@pytest.fixture(scope="session")
def reference_gradients() -> Callable[[Config], dict[str, Tensor]]:
    """reference_gradients(config); see the module."""
    return _reference_gradients


def _reference_gradients(config: Config) -> dict[str, Tensor]:
    """Parameter name of the hypernetwork -> float64 gradient of the mean loss over the first global batch."""
    base = load_base(config.base, config.lora)
    model: Any = AutoModelForCausalLM.from_pretrained(config.base.model, dtype=torch.float64).model
    linears = {path.removeprefix("model."): layer for path, layer in base.linears.items()}
    for path, layer in linears.items():
        model.get_submodule(path).weight = torch.nn.Parameter(layer.dense_weight(torch.float32).double(), False)
    model.requires_grad_(False).eval()
    torch.manual_seed(config.run.seed)
    whole = config.hypernetwork.model_copy(update={"generate_per_block": False})
    hypernetwork = build_hypernetwork(whole, config.lora, base.slots, typology.NUM_FEATURES).double()
    pairs = load_corpus(config.data.directory).train
    training = config.training
    lengths = token_lengths(base, pairs, config.data.maximum_tokens, 1 + config.objective.skip_first_token)
    sampler = GlobalSampler(lengths, training.global_batch_size, config.run.seed, training.length_bucket_batches)
    objective, losses = AlignmentObjective(config.objective), []
    for sample in sampler.batch(0):
        pair = pairs[int(sample)]
        target, mask = _states(model, base, pair.standard, None)
        kept = objective.token_mask(mask)
        factors = hypernetwork(torch.from_numpy(pair.vector.copy()).double()[None])
        states, own = _states(model, base, pair.dialect, factors)
        aligned = objective.normalize(target)[kept][None]
        losses.append(objective(states, own, aligned, torch.ones(aligned.shape[:2], dtype=torch.bool))[0])
    torch.stack(losses).mean().backward()
    return {name: parameter.grad for name, parameter in hypernetwork.named_parameters()}


def _states(model: Any, base: Any, text: str, factors: Any) -> tuple[Tensor, Tensor]:
    """(1, T, D) states and (1, T) mask of one text under the adapter of one condition, or none."""
    handles = []
    for slot in factors.slots if factors is not None else ():
        a, b = factors.a[slot.path][0], factors.b[slot.path][0]

        def hook(module: Any, args: Any, output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return output + factors.scale * (args[0] @ a.T) @ b.T

        handles.append(model.get_submodule(slot.path.removeprefix("model.")).register_forward_hook(hook))
    ids, mask = tokenize(base, [text])
    states = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return states, mask
