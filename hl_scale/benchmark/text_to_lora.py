"""A Text-to-LoRA step against the same step as published (arXiv 2506.06105): forward hooks that copy A and B per token.

The published computation has a dense base, a padded batch, one hook per slot with A and B repeated for every token of
an example and two batched products, and logits of every token. Ours has the 4-bit base and dequantises it, packs the
examples, gives each run of tokens its adapter, and forms logits of answer tokens alone, a few at a time. Hypernetwork,
batch and weights are the same (the dense base holds the dequantised ones), and loss and gradients must agree first.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.base import AdaptedModel, load_base
from hl_scale.base.loading import resolve_model
from hl_scale.benchmark.measure import describe_machine, error, measured, timed
from hl_scale.config import Config, load_config
from hl_scale.data.tasks import open_tasks
from hl_scale.engine.supervised import SupervisedWorkload, TaskBatch
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.lora import LoraFactors

RECIPE = Path("configs/t2l_gemma270m_cpu.yaml")
AS_PUBLISHED = (
    "hypernetwork.kind=text_to_lora", "hypernetwork.latent_width=256", "hypernetwork.head_width=256", "lora.rank=8",
    "lora.alpha=32", "conditions.encoder=package:all-minilm-l6-v2", "conditions.noise=0",
    "objective.unfamiliar_penalty=0", "data.examples_per_condition=2", "training.global_batch_size=32",
    "training.micro_batch_size=16",
)  # fmt: skip
"""Of the recipe: hypernetwork, rank and batch as published, at widths that suit the small base."""
TOLERANCE = 1e-3
"""Of the loss and of each parameter's gradient, relative to its largest entry; float32 through all blocks."""


def run_text_to_lora_benchmark(recipe: Path | None, threads: int | None, repeats: int) -> int:
    """Print the table; returns 1 where the steps do not agree, else 0.

    Raises:
        ValueError: the recipe is not of a supervised run, or its tasks are not prepared.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    config = load_config(recipe) if recipe else load_config(RECIPE, AS_PUBLISHED)
    case = _Case(config)
    print(describe_machine("cpu"))
    batch = case.batch
    print(
        f"{recipe or RECIPE}: {batch.tokens} tokens, {len(batch.input_ids)} examples, {len(batch.conditions)} adapters"
    )
    steps = {"ours": case.ours, "as published: copies per token, all logits": case.published}
    found = {name: measured(step, "cpu") for name, step in steps.items()}
    exact = [tensor.double() for tensor in found["ours"][0]]
    worst = max(error(result, exact) for result, _, _ in found.values())
    if not worst <= TOLERANCE:
        print(f"not timed: loss or gradients differ by {worst:.1e}, more than {TOLERANCE:.0e}")
        return 1
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(max(repeats, 1)):
        for name, step in steps.items():
            times[name].append(timed(step, "cpu")[1])
    print(
        "\n| step | seconds | tokens/s | its time / ours | extra memory, MB | difference |\n|---|---|---|---|---|---|"
    )
    own = statistics.median(times["ours"])
    for name, taken in times.items():
        seconds, memory = statistics.median(taken), found[name][2]
        ratio = "" if name == "ours" else f"{seconds / own:.2f}"
        row = [name, f"{seconds:.3f}", f"{batch.tokens / seconds:.0f}", ratio, f"{memory / 1e6:.0f}"]
        print(f"| {' | '.join(row)} | {error(found[name][0], exact):.0e} |", flush=True)
    return 0


class _Case:
    """The recipe's first batch and a hypernetwork whose every parameter has a gradient."""

    def __init__(self, config: Config) -> None:
        self.settings = config.supervised
        if self.settings.neftune_alpha or self.settings.weight_penalty or self.settings.unfamiliar_penalty:
            raise ValueError("the step is compared without NEFTune and penalties\n  fix: take such a recipe")
        self.base = load_base(config.base, config.lora)
        workload = SupervisedWorkload(config, self.base, open_tasks(config.tasks))
        workload.vectors.prepare()
        self.batch = workload.collate(workload.sampler.batch(0))
        torch.manual_seed(config.run.seed)
        self.hypernetwork = build_hypernetwork(
            config.hypernetwork, config.lora, self.base.slots, workload.condition_size
        )
        for name, parameter in self.hypernetwork.named_parameters():
            if ".weight" in name and not parameter.any():
                nn.init.normal_(parameter, std=1e-3)
        self.module = workload.module(self.hypernetwork)
        self.dense = dense_model(config, self.base)

    def ours(self) -> list[Tensor]:
        return self._gradients(self.module(self.batch))

    def published(self) -> list[Tensor]:
        factors = self.hypernetwork(self.batch.conditions)
        return self._gradients(published_loss(self.dense, self.batch, factors, self.settings.label_smoothing))

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        """Loss and gradients of the hypernetwork, which are cleared."""
        loss.backward()
        found = [loss.detach()]
        for parameter in self.hypernetwork.parameters():
            assert parameter.grad is not None
            found.append(parameter.grad)
            parameter.grad = None
        return found


def dense_model(config: Config, base: AdaptedModel) -> Any:
    """The transformers model with the dequantised weights of the base's linear layers, frozen."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, config.base.compute_dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(resolve_model(config.base), dtype=dtype)
    for path, layer in base.linears.items():
        model.get_submodule(path).weight = nn.Parameter(layer.dense_weight(dtype), requires_grad=False)
    return model.requires_grad_(False).eval()


def published_loss(model: Any, batch: TaskBatch, factors: LoraFactors, label_smoothing: float = 0.0) -> Tensor:
    """Mean loss of the batch by hooks that repeat A and B for every token.

    Args:
        model: dense transformers model.
        batch: padded on the right.
        factors: of the batch's E conditions.
        label_smoothing: as in the objective.
    """
    each = factors.select(batch.condition_index)
    length = batch.input_ids.shape[1]
    handles = []
    for slot in factors.slots:
        a, b = each.a[slot.path], each.b[slot.path]

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            tokens = args[0].flatten(0, 1)[:, None]
            down = torch.bmm(tokens, a.repeat_interleave(length, 0).mT)
            up = torch.bmm(down, b.repeat_interleave(length, 0).mT)
            return output + factors.scale * up.view_as(output)

        handles.append(model.get_submodule(slot.path).register_forward_hook(hook))
    try:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    answers = batch.answers[:, 1:]
    targets = batch.input_ids[:, 1:].masked_fill(~answers, -100)
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return (losses.view_as(targets).sum(1) / answers.sum(1)).mean()
