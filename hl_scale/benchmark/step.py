"""A whole training step of a recipe against the same step from stock parts, and where the time goes in both.

Stock parts: transformers' model with bitsandbytes' Linear4bit, a LoRA module in the manner of PEFT with batched
matmuls, GeomLoss on the padded batch. Both have the same 4-bit bytes, hypernetwork, optimizer, batch and annealing
schedule, and must agree in loss and in the hypernetwork's gradients before anything is timed. The stock step is timed
twice: with frozen targets at hand, as ours has them, and computing them by a pass of the bare base, as a step without
such a cache does. What no step can go below are the products with the frozen weights; they are timed alone.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hl_scale.base import AdaptedModel, load_base
from hl_scale.base.quantized_linear import QuantizedLinear
from hl_scale.benchmark.measure import describe_machine, error, measured
from hl_scale.conditions import typology
from hl_scale.config import Config, load_config
from hl_scale.data.corpus import Pair, load_corpus
from hl_scale.data.sampling import GlobalSampler
from hl_scale.engine.alignment import AlignmentBatch, AlignmentModule, token_lengths
from hl_scale.engine.targets import TargetCache, tokenize
from hl_scale.hypernetwork import Hypernetwork, build_hypernetwork
from hl_scale.kernels.nf4 import NESTED_BLOCK_SIZE, NF4_CODE, dynamic_map
from hl_scale.lora import LoraFactors
from hl_scale.objectives.alignment import AlignmentObjective

RECIPE = Path("configs/demo_gemma270m_cpu.yaml")
TOLERANCE = 1e-4
"""Of loss and gradients between the two steps, relative to the largest entry; float32 through all blocks."""
PHASES = ("hypernetwork", "base, forward", "objective", "base, backward", "hypernetwork, backward", "optimizer")

Forward = Callable[[LoraFactors], Tensor]
Loss = Callable[[Tensor], Tensor]


@dataclass
class Step:
    """Parts of one training step.

    Attributes:
        hidden: factors -> hidden states.
        loss: hidden states -> mean divergence.
        before: what comes before the step, or None.
    """

    hidden: Forward
    loss: Loss
    before: Callable[[], object] | None = None
    phases: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})


def run_step_benchmark(recipe: Path | None, threads: int | None, repeats: int) -> int:
    """Print both tables; returns 1 where the steps do not agree, else 0.

    Raises:
        ValueError: the recipe or its corpus is missing, or bitsandbytes or geomloss is not installed.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    config = load_config(recipe or RECIPE)
    case = _Case(config)
    print(describe_machine("cpu"))
    print(f"{recipe or RECIPE}: {case.tokens} tokens in {len(case.batch.input_ids)} sentences")
    steps = case.steps()
    reference = case.gradients(steps["ours"])
    errors = {name: error(case.gradients(step), [t.double() for t in reference]) for name, step in steps.items()}
    worst = max(errors.values())
    if not worst <= TOLERANCE:
        print(f"not timed: loss or gradients differ by {worst:.1e}, more than {TOLERANCE:.0e}")
        return 1
    memory = {name: measured(partial(case.gradients, step), "cpu")[2] for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    limit: list[float] = []
    for _ in range(max(repeats, 1)):
        for name, step in steps.items():
            started = time.perf_counter()
            case.step(step)
            times[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        case.frozen_products()
        limit.append(time.perf_counter() - started)
    print(f"products with the frozen weights alone, dense: {statistics.median(limit):.3f} s")
    _print_steps(case.tokens, {name: statistics.median(taken) for name, taken in times.items()}, memory, errors)
    _print_phases(steps, case, repeats)
    return 0


def _print_steps(tokens: int, times: dict[str, float], memory: dict[str, float], errors: dict[str, float]) -> None:
    print(
        "\n| step | seconds | tokens/s | its time / ours | extra memory, MB | difference |\n|---|---|---|---|---|---|"
    )
    for name, seconds in times.items():
        ratio = "" if name == "ours" else f"{seconds / times['ours']:.2f}"
        row = [name, f"{seconds:.3f}", f"{tokens / seconds:.0f}", ratio, f"{memory[name] / 1e6:.0f}"]
        print(f"| {' | '.join(row)} | {errors[name]:.0e} |", flush=True)


def _print_phases(steps: dict[str, Step], case: _Case, repeats: int) -> None:
    for _ in range(max(repeats, 1)):
        for step in steps.values():
            case.step_in_phases(step)
    names = list(steps)[:2]
    print(f"\n| milliseconds of a step | {' | '.join(names)} |\n|---|---|---|")
    for phase in PHASES:
        figures = [f"{1e3 * statistics.median(steps[name].phases[phase]):.0f}" for name in names]
        print(f"| {phase} | {' | '.join(figures)} |")


def first_batch(config: Config, base: AdaptedModel) -> list[Pair]:
    """The pairs of the recipe's first step."""
    pairs, training = load_corpus(config.data.directory).train, config.training
    lengths = token_lengths(base, pairs, config.data.maximum_tokens, 1 + config.alignment.skip_first_token)
    sampler = GlobalSampler(lengths, training.global_batch_size, config.run.seed, training.length_bucket_batches)
    return [pairs[int(sample)] for sample in sampler.batch(0)]


class _Case:
    """The recipe's first batch, ours and the stock parts around one hypernetwork."""

    def __init__(self, config: Config) -> None:
        if config.hypernetwork.kind != "hyperlora" or not config.base.double_quantization:
            raise ValueError(
                "the step is compared for hypernetwork.kind: hyperlora on a base with base.double_quantization: true\n"
                "  fix: take such a recipe, for example the demo's"
            )
        whole = config.hypernetwork.model_copy(update={"generate_per_block": False})
        config = config.model_copy(update={"hypernetwork": whole})
        self.base = load_base(config.base, config.lora)
        pairs = first_batch(config, self.base)
        objective = AlignmentObjective(config.alignment)
        cache = TargetCache(Path(f"{config.data.directory}-targets"), self.base, objective)
        self.standard = tokenize(self.base, [pair.standard for pair in pairs])
        clouds = cache.clouds([pair.standard for pair in pairs], torch.device("cpu"))
        target = nn.utils.rnn.pad_sequence([cloud.float() for cloud in clouds], batch_first=True)
        sizes = torch.tensor([len(cloud) for cloud in clouds])
        # One diameter for both solvers: GeomLoss would take one for the batch, we one for each pair.
        self.diameter = 2.0 * float(target.norm(dim=-1).max())
        self.objective = AlignmentObjective(config.alignment.model_copy(update={"diameter": self.diameter}))
        mask = torch.arange(target.shape[1])[None] < sizes[:, None]
        input_ids, attention_mask = tokenize(self.base, [pair.dialect for pair in pairs])
        vectors = torch.stack([torch.from_numpy(pair.vector.copy()) for pair in pairs])
        own = self.objective.self_terms(target, mask)
        self.batch = AlignmentBatch(input_ids, attention_mask, vectors, torch.arange(len(pairs)), target, mask, own)
        self.tokens = int(attention_mask.sum())
        torch.manual_seed(config.run.seed)
        self.hypernetwork: Hypernetwork = build_hypernetwork(
            config.hypernetwork, config.lora, self.base.slots, typology.NUM_FEATURES
        )
        for head in self.hypernetwork.get_submodule("heads_b").children():  # so that factors A have a gradient too
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=1e-3)
        self.module = AlignmentModule(self.hypernetwork, self.base, self.objective, False)
        self.stock = StockModel(config, self.base)
        self.shapes = Counter((layer.out_features, layer.in_features) for layer in self.base.linears.values())
        self.optimizer = torch.optim.AdamW(self.hypernetwork.parameters(), lr=0.0)  # steps repeat the same numbers
        self.blur, self.scaling = config.alignment.blur, config.alignment.scaling

    def steps(self) -> dict[str, Step]:
        ids, mask = self.batch.input_ids, self.batch.attention_mask

        def ours(hidden: Tensor) -> Tensor:
            batch = self.batch
            return self.objective(hidden, mask, batch.target, batch.target_mask, batch.target_self)[0]

        def stock_hidden(factors: LoraFactors) -> Tensor:
            return self.stock(ids, mask, factors)

        stock_loss = self._geomloss()
        with_targets = "stock parts, targets computed in the step"
        return {
            "ours": Step(lambda factors: self.base.hidden_states(ids, mask, factors), ours),
            "stock parts": Step(stock_hidden, stock_loss),
            with_targets: Step(stock_hidden, stock_loss, before=lambda: self.stock(*self.standard, None)),
        }

    def _geomloss(self) -> Loss:
        from geomloss import SamplesLoss

        solver = SamplesLoss(
            "sinkhorn", p=2, blur=self.blur, scaling=self.scaling, diameter=self.diameter, backend="tensorized"
        )
        weights = [m.float() for m in (self.objective.token_mask(self.batch.attention_mask), self.batch.target_mask)]
        weights = [w / w.sum(1, keepdim=True) for w in weights]

        def loss(hidden: Tensor) -> Tensor:
            x = self.objective.normalize(hidden)
            values: Tensor = solver(weights[0], x, weights[1], self.batch.target)
            return values.mean()

        return loss

    def frozen_products(self) -> None:
        """x W^T and dy W of every layer with weights at hand in full, on as many rows as the step has."""
        rows = self.batch.input_ids.numel()
        for shape, count in self.shapes.items():
            x, dy, weight = torch.ones(rows, shape[1]), torch.ones(rows, shape[0]), torch.ones(shape)
            for _ in range(count):
                torch.nn.functional.linear(x, weight)
                dy @ weight

    def _backward(self, step: Step) -> Tensor:
        """Forward and backward; the loss."""
        self.optimizer.zero_grad()
        loss = step.loss(step.hidden(self.hypernetwork(self.batch.conditions)))
        loss.backward()
        return loss.detach()

    def gradients(self, step: Step) -> list[Tensor]:
        """Loss and gradients of the hypernetwork."""
        loss = self._backward(step)
        return [loss, *(p.grad.clone() for p in self.hypernetwork.parameters() if p.grad is not None)]

    def step(self, step: Step) -> Tensor:
        """One training step; its loss."""
        if step.before is not None:
            with torch.no_grad():
                step.before()
        loss = self._backward(step)
        nn.utils.clip_grad_norm_(self.hypernetwork.parameters(), 1.0)
        self.optimizer.step()
        return loss

    def step_in_phases(self, step: Step) -> None:
        """The same step with its graph cut between phases, each timed."""
        clock = [time.perf_counter()]
        self.optimizer.zero_grad()
        factors = self.hypernetwork(self.batch.conditions)
        clock.append(time.perf_counter())
        leaves = [
            f.detach().requires_grad_() for slot in factors.slots for f in (factors.a[slot.path], factors.b[slot.path])
        ]
        paths = [slot.path for slot in factors.slots]
        a, b = dict(zip(paths, leaves[::2], strict=True)), dict(zip(paths, leaves[1::2], strict=True))
        hidden = step.hidden(LoraFactors(factors.slots, a, b, factors.scale))
        clock.append(time.perf_counter())
        states = hidden.detach().requires_grad_()
        step.loss(states).backward()
        clock.append(time.perf_counter())
        hidden.backward(states.grad)
        clock.append(time.perf_counter())
        generated = [f for path in paths for f in (factors.a[path], factors.b[path])]
        torch.autograd.backward(generated, [leaf.grad for leaf in leaves])
        clock.append(time.perf_counter())
        nn.utils.clip_grad_norm_(self.hypernetwork.parameters(), 1.0)
        self.optimizer.step()
        clock.append(time.perf_counter())
        for phase, start, stop in zip(PHASES, clock, clock[1:], strict=False):
            step.phases[phase].append(stop - start)


class StockLinear(nn.Module):
    """bitsandbytes' Linear4bit with a LoRA per row beside it, as PEFT adds one: y + s (x A^T) B^T."""

    def __init__(self, layer: QuantizedLinear) -> None:
        import bitsandbytes
        from bitsandbytes.functional import QuantState

        super().__init__()
        constants, packed = layer.constants, layer.packed.detach()
        nested = QuantState(
            absmax=constants.nested_absmax, blocksize=NESTED_BLOCK_SIZE, code=dynamic_map(packed.device),
            dtype=torch.float32,
        )  # fmt: skip
        state = QuantState(
            absmax=constants.absmax, shape=torch.Size(constants.shape), code=torch.tensor(NF4_CODE), blocksize=64,
            quant_type="nf4", dtype=torch.float32, offset=constants.offset, state2=nested,
        )  # fmt: skip
        self.base = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        self.base.weight = bitsandbytes.nn.Params4bit(
            packed[:, None], requires_grad=False, quant_state=state, bnb_quantized=True, module=self.base
        )
        self.base.quant_state = state
        self.lora: tuple[Tensor, Tensor, float] | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.lora is None:
            return y
        a, b, scale = self.lora
        return y + (x @ a.mT) @ b.mT * scale


class StockModel(nn.Module):
    """The recipe's base as transformers loads it, its linear layers replaced by `StockLinear` with our 4-bit bytes."""

    def __init__(self, config: Config, base: AdaptedModel) -> None:
        from transformers import AutoModelForCausalLM

        from hl_scale.base.loading import resolve_model

        super().__init__()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_model(config.base), dtype=getattr(torch, config.base.compute_dtype)
        )
        self.layers: dict[str, StockLinear] = {}
        for path, layer in base.linears.items():
            if not isinstance(layer, QuantizedLinear) or layer.bias is not None:
                raise ValueError(
                    f"the step is compared on 4-bit layers without bias, which {path} is not\n"
                    "  fix: take a recipe with base.quantization: nf4 and a model without biases"
                )
            parent, _, name = path.rpartition(".")
            stock = self.layers[path] = StockLinear(layer)
            setattr(loaded.get_submodule(parent), name, stock)
        # Training mode: in evaluation the stock layer repacks its weight on some CPUs. There is no dropout.
        self.model = loaded.base_model.requires_grad_(False).train()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, factors: LoraFactors | None) -> Tensor:
        """(B, T, D) states after the final norm."""
        for path, layer in self.layers.items():
            layer.lora = None
            if factors is not None and path in factors.a:
                layer.lora = (factors.a[path], factors.b[path], factors.scale)
        states: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return states
