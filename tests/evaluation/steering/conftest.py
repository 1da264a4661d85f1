"""A tiny model on tasks over letters, and slow twins that generate and score row by row."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from hl_scale.base import AdaptedModel, TaskAdapter
from hl_scale.base.loading import adapt_model
from hl_scale.config import Config, dump_config, parse_config
from hl_scale.data.tasks import Example, Task, TaskSet
from hl_scale.engine.conditions import open_conditions
from hl_scale.engine.run import LoadedRun
from hl_scale.evaluation.arms import TrialVectors
from hl_scale.evaluation.trials import make_trials
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.lora import LoraFactors, sum_factors

LETTERS = "abcdef"
# Pairs of letters are tokens that only the model uses: the tokenizer splits text into characters.
VOCABULARY = ["<pad>", "<s>", "</s>", "\n", *" =>", *LETTERS, *(a + b for a in LETTERS for b in LETTERS)]


def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def model() -> Any:
    torch.manual_seed(2)
    made = Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=1, head_dim=8, max_position_embeddings=96, sliding_window=16,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.4, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        made.get_output_embeddings().weight[VOCABULARY.index("\n")] *= 2.0  # answers end
    return made


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., LoadedRun]:
    """make_run(hypernetwork={...}, data={...}, conditions={...}, context=96) -> a run on the tiny model."""

    def make(hypernetwork: dict[str, Any] | None = None, context: int = 96, **sections: dict[str, Any]) -> LoadedRun:
        directory = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        directory.mkdir()
        kind = hypernetwork or {"kind": "text_to_lora", "size": "L", "latent_width": 8, "head_width": 8}
        tree: dict[str, Any] = {
            "run": {"directory": str(directory)},
            "base": {"model": "example/tiny", "compute_dtype": "float32"},
            "lora": {"rank": 2, "alpha": 2.0, "target_modules": ["q_proj", "v_proj"]},
            "data": {"kind": "tasks", "directory": str(tmp_path / "tasks"), "sources": [{"kind": "builtin"}]},
            "conditions": {"encoder": "base"},
            "hypernetwork": kind,
            "objective": {"kind": "supervised"},
            "training": {"steps": 10, "global_batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-3},
            "evaluation": {"batch_size": 5, "bootstrap_samples": 200},
        }
        for section, values in sections.items():
            tree[section] = tree[section] | values
        config: Config = parse_config(tree)
        causal = model()
        causal.config.max_position_embeddings = context
        base = adapt_model(causal, tokenizer(), config.base, config.lora, fingerprint="f" * 64)
        if config.conditions.kind == "one_hot":
            from hl_scale.engine.conditions import OneHotConditions

            conditions: Any = OneHotConditions(config, task_set(tmp_path).seen)
        else:
            conditions = open_conditions(config, base)
        network = build_hypernetwork(config.hypernetwork, config.lora, base.slots, conditions.size)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        network.requires_grad_(False).eval()
        return LoadedRun(directory, config, base, network, conditions, 10, f"{'d' * 64}:encoder")

    return make


INPUTS = ("abc", "fade", "bb", "cafe", "def", "ace", "deaf", "fab", "bead")


OPERATIONS: dict[str, Callable[[str], str]] = {
    "first": lambda text: text[0],
    "last": lambda text: text[-1],
    "copy": lambda text: text,
    "has_a": lambda text: "ab" if "a" in text else "cd",
    "back": lambda text: text[::-1],
    "lacks_a": lambda text: "cd" if "a" in text else "ab",
}


def task_set(directory: Path) -> TaskSet:
    """Six tasks over the same inputs: two of `choice` answers, two held out; 5 training and 4 test examples."""
    words = {"first": "a", "last": "b", "copy": "c", "has_a": "d", "back": "e", "lacks_a": "f"}
    tasks = []
    for name, operation in OPERATIONS.items():
        examples = [Example(text, operation(text)) for text in INPUTS]
        word = words[name]
        tasks.append(
            Task(
                name, "letters", "choice" if name.endswith("_a") else "open",
                (f"{word} be dad", f"fed {word} {word}", f"{word} {word}{word} a"), (f"bad {word}", f"bee {word} f"),
                tuple(examples[:5]), tuple(examples[5:]), seen=name not in ("back", "lacks_a"),
            )
        )  # fmt: skip
    return TaskSet(directory / "tasks", {"fingerprint": "d" * 64}, tuple(tasks))


@pytest.fixture
def tasks(tmp_path: Path) -> TaskSet:
    return task_set(tmp_path)


@torch.no_grad()
def slow_output(base: AdaptedModel, prompt: str, factors: LoraFactors | None, limit: int = 8) -> str:
    """First line of the greedy continuation, a whole pass for every token."""
    ids = [1, *base.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    text = ""
    for _ in range(limit):
        row = torch.tensor([ids])
        ids.append(int(base.logits(row, torch.ones_like(row), factors)[0, -1].argmax()))
        if VOCABULARY[ids[-1]] in ("\n", "</s>"):
            break
        text += VOCABULARY[ids[-1]] if ids[-1] > 2 else ""
    return text.strip()


@torch.no_grad()
def slow_loss(base: AdaptedModel, prompt: str, answer: str, factors: LoraFactors | None) -> float:
    """Mean over the answer's tokens and its end of -log p, in nats."""
    start = [1, *base.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    end = base.tokenizer(f" {answer}\n", add_special_tokens=False)["input_ids"]
    row = torch.tensor([start + end])
    logs = base.logits(row, torch.ones_like(row), factors)[0].double().log_softmax(-1)
    return float(np.mean([-logs[len(start) + i - 1, token].item() for i, token in enumerate(end)]))


def carried(run: LoadedRun, vector: Any | None) -> LoraFactors | None:
    """Factors of a condition and of what the run was trained on top of, added."""
    own = [] if vector is None else [run.hypernetwork(torch.from_numpy(vector)[None])]
    fixed = [] if run.task_adapter is None else [run.task_adapter.factors]
    return sum_factors(*own, *fixed) if own or fixed else None


def with_outputs_as_answers(tasks: TaskSet, run: LoadedRun, arm: str) -> TaskSet:
    """Every other test example gets the output of an arm as its answer, so that some outputs are right.

    Outputs hold pairs of letters that are one token, where the answer has two.
    """
    trials = make_trials(tasks)
    vectors = TrialVectors(run.conditions, trials, 0)
    answers: dict[tuple[str, int], str] = {}
    for trial in trials:
        factors = carried(run, None if arm == "base" else vectors.vector(trial, arm))
        output = slow_output(run.base, f"{trial.example.input} =>", factors)
        if trial.number % 2 == 0 and output:
            answers.setdefault((trial.task.name, trial.number), output)
    changed = []
    for task in tasks.tasks:
        test = [replace(e, answer=answers.get((task.name, i), e.answer)) for i, e in enumerate(task.test)]
        changed.append(replace(task, test=tuple(test)))
    return replace(tasks, tasks=tuple(changed))


def slow_answers(run: LoadedRun, tasks: TaskSet, arm: str) -> list[tuple[bool, float]]:
    """Verdict and loss of each trial."""
    trials = make_trials(tasks)
    vectors = TrialVectors(run.conditions, trials, run.config.evaluation.seed)
    found = []
    first = {(t.task.name, t.number): t for t in reversed(trials)}
    for trial in trials:
        if arm in ("random", "base+description"):
            trial = first[trial.task.name, trial.number]
        prompt = f"{trial.example.input} =>"
        if arm == "base+description":
            prompt = f"{trial.description}\n{prompt}"
        factors = carried(run, None if arm.startswith("base") else vectors.vector(trial, arm))
        limit = max(len(example.answer) for example in trial.task.test) + 4
        right = slow_output(run.base, prompt, factors, limit) == trial.example.answer
        found.append((right, slow_loss(run.base, prompt, trial.example.answer, factors)))
    return found


def frozen_adapter(run: LoadedRun) -> TaskAdapter:
    """Random factors of rank 3 in all slots."""
    generator = torch.Generator().manual_seed(11)
    a = {s.path: 0.3 * torch.randn(1, 3, s.in_features, generator=generator) for s in run.base.slots}
    b = {s.path: 0.3 * torch.randn(1, s.out_features, 3, generator=generator) for s in run.base.slots}
    return TaskAdapter("frozen", LoraFactors(run.base.slots, a, b, 0.5), "a" * 64)


@pytest.fixture
def on_disk(make_run: Callable[..., LoadedRun], tmp_path: Path) -> LoadedRun:
    """A run whose tasks are prepared on disk."""
    from hl_scale.data.tasks import prepare_tasks

    rows = [
        {
            "name": task.name, "family": task.family, "answers": task.answers, "seen": task.seen,
            "descriptions": task.descriptions, "heldout_descriptions": task.heldout_descriptions,
            "examples": [vars(example) for example in task.train], "test": [vars(example) for example in task.test],
        }
        for task in task_set(tmp_path).tasks
    ]  # fmt: skip
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = make_run(data={"sources": [{"kind": "jsonl", "path": str(tmp_path / "tasks.jsonl")}]})
    made = prepare_tasks(run.config.tasks)
    (run.directory / "config.yaml").write_text(dump_config(run.config))
    return replace(run, data_fingerprint=made.tasks.manifest["fingerprint"])
