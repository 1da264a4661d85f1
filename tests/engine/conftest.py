"""Gradients of the first step in float64, from a plain transformers model with hooks: an oracle for every way to train.

The frozen weights are those the quantised base holds, and the hypernetwork starts from the same draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hl_scale.base import load_base, read_task_adapter
from hl_scale.conditions import typology
from hl_scale.config import Config
from hl_scale.data.corpus import load_corpus
from hl_scale.data.sampling import GlobalSampler
from hl_scale.data.tasks import open_tasks
from hl_scale.engine.alignment import token_lengths
from hl_scale.engine.supervised import SupervisedWorkload
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
    inputs = _tasks if config.data.kind == "tasks" else _dialects
    condition_size, losses = inputs(config, base, model)
    hypernetwork = build_hypernetwork(whole, config.lora, base.slots, condition_size).double()
    torch.stack(losses(hypernetwork)).mean().backward()
    return {name: parameter.grad for name, parameter in hypernetwork.named_parameters()}


def _dialects(config: Config, base: Any, model: Any) -> tuple[int, Any]:
    pairs = load_corpus(config.data.directory).train
    training = config.training
    lengths = token_lengths(base, pairs, config.data.maximum_tokens, 1 + config.alignment.skip_first_token)
    sampler = GlobalSampler(lengths, training.global_batch_size, config.run.seed, training.length_bucket_batches)
    objective = AlignmentObjective(config.alignment)
    fixed = _fixed(config, base)

    def losses(hypernetwork: Any) -> list[Tensor]:
        found = []
        for sample in sampler.batch(0):
            pair = pairs[int(sample)]
            target, mask = _states(model, base, pair.standard, fixed)
            kept = objective.token_mask(mask)
            factors = hypernetwork(torch.from_numpy(pair.vector.copy()).double()[None])
            states, own = _states(model, base, pair.dialect, [factors, *fixed])
            aligned = objective.normalize(target)[kept][None]
            found.append(objective(states, own, aligned, torch.ones(aligned.shape[:2], dtype=torch.bool))[0])
        return found

    return typology.NUM_FEATURES, losses


def _tasks(config: Config, base: Any, model: Any) -> tuple[int, Any]:
    """One example at a time, from its text: what a batch, its packing and its noise must come to."""
    workload = SupervisedWorkload(config, base, open_tasks(config.tasks))
    workload.vectors.prepare()
    fixed = _fixed(config, base)
    settings, tokenizer = config.supervised, base.tokenizer
    head = model.get_input_embeddings().weight  # tied
    scale = base.hidden_size**0.5

    def losses(hypernetwork: Any) -> list[Tensor]:
        found = []
        for task, wording, number, draw in workload.sampler.batch(0).tolist():
            example = workload.tasks[task].train[number]
            first = draw - draw % config.tasks.examples_per_condition  # a group shares a condition, and its noise
            vector = workload.vectors.vector(task, wording, first)
            factors = hypernetwork(torch.from_numpy(vector).double()[None])
            prompt = [tokenizer.bos_token_id, *tokenizer(f"{example.input} =>", add_special_tokens=False)["input_ids"]]
            ids = torch.tensor([*prompt, *tokenizer(f" {example.answer}.", add_special_tokens=False)["input_ids"]])
            generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + draw)
            noise = torch.rand(len(ids), base.hidden_size, generator=generator).double() * 2 - 1
            noise *= settings.neftune_alpha / (len(ids) * base.hidden_size) ** 0.5
            states = _run(model, [factors, *fixed], inputs_embeds=(head[ids] * scale + noise)[None])[0]
            scores = (states[len(prompt) - 1 : -1] @ head.T).log_softmax(-1)
            right = scores.gather(1, ids[len(prompt) :, None])[:, 0]
            smoothing = settings.label_smoothing
            loss = -((1 - smoothing) * right + smoothing * scores.mean(1)).mean()
            for module in config.lora.target_modules:
                for side in (factors.a, factors.b):
                    own = torch.stack([side[slot.path] for slot in factors.slots if slot.module == module])
                    loss = loss + settings.weight_penalty * own.square().mean()
            random = hypernetwork(torch.from_numpy(workload.vectors.unfamiliar(task, wording, first)).double()[None])
            loss = loss + settings.unfamiliar_penalty * _square(random) / _square(factors).detach().clamp(min=1e-30)
            found.append(loss)
        return found

    return workload.condition_size, losses


def _square(factors: Any) -> Tensor:
    """|delta W|^2 of one condition, formed."""
    return torch.stack(
        [(factors.scale * factors.b[path][0] @ a[0]).square().sum() for path, a in factors.a.items()]
    ).sum()


def _fixed(config: Config, base: Any) -> list[Any]:
    """Factors of the task adapter, if there is one."""
    adapter = config.lora.task_adapter
    return [] if adapter is None else [read_task_adapter(adapter, base, config.base).factors.to("cpu", torch.float64)]


def _states(model: Any, base: Any, text: str, adapters: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(1, T, D) states and (1, T) mask of one text under adapters of one condition each, all of them added."""
    ids, mask = tokenize(base, [text])
    return _run(model, adapters, input_ids=ids, attention_mask=mask), mask


def _run(model: Any, adapters: Sequence[Any], **inputs: Tensor) -> Tensor:
    handles = []
    for own, slot in ((factors, slot) for factors in adapters for slot in factors.slots):
        a, b = own.scale * own.a[slot.path][0], own.b[slot.path][0]

        def hook(module: Any, args: Any, output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return output + (args[0] @ a.T) @ b.T

        handles.append(model.get_submodule(slot.path.removeprefix("model.")).register_forward_hook(hook))
    states = model(**inputs, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return states
