"""The task evaluation on a tiny model: every number against a slow twin that generates and scores row by row."""

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
from hl_scale.conditions.descriptions import EncoderError
from hl_scale.config import Config, dump_config, parse_config
from hl_scale.data.tasks import Example, Task, TaskSet
from hl_scale.engine.conditions import DescriptionConditions, open_conditions
from hl_scale.engine.run import LoadedRun
from hl_scale.engine.supervised import PromptFormat
from hl_scale.evaluation import EvaluationError, evaluate_run, evaluate_tasks, steering_summaries, steering_tables
from hl_scale.evaluation.answers import Answer, Answerer
from hl_scale.evaluation.arms import ARMS, TrialVectors, in_context, make_arms
from hl_scale.evaluation.command import Request
from hl_scale.evaluation.trials import HELDOUT, NEW, TRAINED, make_trials
from hl_scale.hypernetwork import build_hypernetwork
from hl_scale.lora import LoraFactors, sum_factors
from hl_scale.serving import generate_adapter

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


GENERATING_ARMS = ["own", "other", "random", "shuffled", "base", "base+description"]


@pytest.mark.parametrize(("arm", "on_top"), [*((arm, False) for arm in GENERATING_ARMS), ("own", True), ("base", True)])
def test_answers_and_losses_are_those_of_generating_and_scoring_every_trial_alone(
    make_run: Callable[..., LoadedRun], tasks: TaskSet, arm: str, on_top: bool
) -> None:
    run = make_run()
    run = replace(run, task_adapter=frozen_adapter(run)) if on_top else run
    tasks = with_outputs_as_answers(tasks, run, "base" if arm.startswith("base") else arm)
    trials = make_trials(tasks)
    text = PromptFormat(run.base.tokenizer, run.config.tasks, run.base.context_length)
    arms = make_arms(run, text, TrialVectors(run.conditions, trials, 0))
    expected = slow_answers(run, tasks, arm)
    assert {right for right, _ in expected} == {True, False} or arm == "base+description"
    for every in (False, True):
        answers = Answerer(text, 5).answers(arms[arm], trials, all_outputs=every)
        assert [answer.right for answer in answers] == [right for right, _ in expected]
        np.testing.assert_allclose([answer.loss for answer in answers], [loss for _, loss in expected], rtol=1e-4)
        assert not every or all(answer.output is not None for answer in answers)


def test_outputs_here_hold_tokens_that_no_answer_is_split_into(make_run: Callable[..., LoadedRun]) -> None:
    """Else the test above would not see that a first token other than the answer's may still begin the answer."""
    base = make_run().base
    ids = torch.tensor([[1, *base.tokenizer(f"{INPUTS[0]} =>", add_special_tokens=False)["input_ids"]]])
    (tokens,) = base.generate(ids, torch.ones_like(ids), max_new_tokens=8, stop_ids=[VOCABULARY.index("\n")])
    assert any(len(VOCABULARY[token]) == 2 for token in tokens), tokens


def test_group_numbers_are_means_over_tasks_of_means_over_examples(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    run = make_run()
    tasks = with_outputs_as_answers(tasks, run, "own")
    # Tasks of unequal size, so that a mean over all examples would be another number.
    first = replace(tasks.tasks[0], test=tasks.tasks[0].test[:1])
    tasks = replace(tasks, tasks=(first, *tasks.tasks[1:]))
    result = evaluate_tasks(run, tasks, progress=False)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    trials, slow = make_trials(tasks), {arm: slow_answers(run, tasks, arm) for arm in ("own", "other", "base")}
    for group in (TRAINED, NEW, HELDOUT):
        for kind in ("open", "choice"):
            names = list(dict.fromkeys(t.task.name for t in trials if t.group == group and t.task.answers == kind))

            def mean(arm: str, part: int, names: list[str] = names, group: str = group) -> float:
                rows = [[i for i, t in enumerate(trials) if t.group == group and t.task.name == n] for n in names]
                return float(np.mean([np.mean([slow[arm][i][part] for i in row]) for row in rows]))

            summary = result["groups"][group][kind]
            assert summary["tasks"] == len(names)
            for arm in slow:
                assert summary["exact"][arm]["value"] == pytest.approx(mean(arm, 0))
                assert summary["loss"][arm]["value"] == pytest.approx(mean(arm, 1), rel=1e-4)
            for arm in ("other", "base"):
                assert summary["margin"][arm]["value"] == pytest.approx(mean(arm, 1) - mean("own", 1), abs=1e-4)
                assert summary["difference"][arm]["value"] == pytest.approx(mean("own", 0) - mean(arm, 0))
    assert result["groups"][NEW]["choice"]["most_frequent_answer"]["value"] <= 0.75
    assert [row["examples"] for row in result["tasks"] if row["task"] == "first"] == [1, 1]


def test_each_test_example_is_asked_once_in_each_group_and_wordings_take_turns(tasks: TaskSet) -> None:
    trials = make_trials(tasks)
    asked = [(t.task.name, t.group, t.number) for t in trials]
    assert len(set(asked)) == len(asked) == 4 * 4 * 2 + 2 * 4
    for trial in trials:
        seen, trained = trial.group != HELDOUT, trial.task.descriptions
        own = {TRAINED: trained, NEW: trial.task.heldout_descriptions}.get(
            trial.group, trained + trial.task.heldout_descriptions
        )
        assert trial.description == own[trial.number % len(own)] and trial.task.seen == seen
        assert trial.other.seen and trial.other.name != trial.task.name
        assert (trial.other_description in trial.other.heldout_descriptions) == (trial.group == NEW)
    assert len(make_trials(tasks, 2)) == 2 * 10


def test_a_run_that_ignores_its_condition_has_margins_of_0_and_the_collapse_warning(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    result = evaluate_tasks(make_run({"kind": "plain_lora"}), tasks, progress=False)
    for kinds in result["groups"].values():
        for summary in kinds.values():
            for arm in ("other", "random", "shuffled"):
                assert [summary["margin"][arm][key] for key in ("low", "value", "high")] == pytest.approx(
                    [0] * 3, abs=1e-6
                )
                assert summary["difference"][arm]["value"] == 0.0
    assert result["updates"]["relative_variance"] == 0.0
    assert result["updates"]["effective_rank"] == pytest.approx(1.0)
    assert sum("is not clear of 0" in warning for warning in result["warnings"]) == 6 * 2
    assert "COLLAPSE" in result["warnings"][0] and "COLLAPSE" in steering_tables.markdown_table(result)


def test_a_run_that_reads_its_condition_has_no_collapse_warning(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    result = evaluate_tasks(make_run(), tasks, arms=["other"], progress=False)
    assert list(result["arms"]) == ["own", "other"] and "without the arms random" in result["reduced"][0]
    assert not any("COLLAPSE" in warning for warning in result["warnings"])
    assert result["updates"]["relative_variance"] > 1e-3


def test_one_hot_conditions_are_asked_about_seen_tasks_alone(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    result = evaluate_tasks(make_run(conditions={"kind": "one_hot"}), tasks, progress=False)
    assert list(result["groups"]) == [TRAINED] and "shuffled" not in result["arms"]
    assert any("No task was held out" in caveat for caveat in result["caveats"])


def test_shuffled_words_that_an_encoder_does_not_read_are_left_out_from_the_end(
    make_run: Callable[..., LoadedRun], tasks: TaskSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    trial = make_trials(tasks)[0]
    whole = TrialVectors(run.conditions, [trial], 0).shuffle(trial).split()
    assert sorted(whole) == sorted(trial.description.split()) and len(whole) == 3
    assert isinstance(run.conditions, DescriptionConditions)

    def check(texts: list[str]) -> None:
        if any(len(text.split()) > 2 for text in texts):
            raise EncoderError("too long")

    monkeypatch.setattr(run.conditions.encoder, "check", check)
    assert TrialVectors(run.conditions, [trial], 0).shuffle(trial).split() == whole[:2]


def test_controls_and_a_library_become_arms(make_run: Callable[..., LoadedRun], tasks: TaskSet) -> None:
    run, plain = make_run(), make_run({"kind": "plain_lora"})
    prompted = make_run({"kind": "plain_lora"}, data={"description_in_prompt": True})
    trials = make_trials(tasks)
    vectors = TrialVectors(run.conditions, trials, 0)
    seen: dict[str, LoraFactors] = {}
    for trial in trials:
        seen[trial.task.name] = run.hypernetwork(torch.from_numpy(vectors.vector(trial, "own"))[None])

    class Adapters:
        def read_all(self, names: Any) -> LoraFactors:
            each = [seen[name] for name in names]
            a = {s.path: torch.cat([f.a[s.path] for f in each]) for s in run.base.slots}
            b = {s.path: torch.cat([f.b[s.path] for f in each]) for s in run.base.slots}
            return LoraFactors(run.base.slots, a, b, each[0].scale)

    text = PromptFormat(run.base.tokenizer, run.config.tasks, run.base.context_length)
    arms = make_arms(run, text, vectors, lora=plain, prompted=prompted, library=Adapters())
    assert list(arms) == list(ARMS)
    shared = plain.hypernetwork(torch.zeros(1, plain.conditions.size))
    for arm in ("lora", "prompted", "library"):
        answers = Answerer(text, 5).answers(arms[arm], trials)
        for trial, answer in list(zip(trials, answers, strict=True))[::5]:
            prompt = f"{trial.description}\n" * (arm == "prompted") + f"{trial.example.input} =>"
            factors = seen[trial.task.name] if arm == "library" else shared
            assert answer.loss == pytest.approx(slow_loss(run.base, prompt, trial.example.answer, factors), rel=1e-4)
    shots = run.base.tokenizer.decode(in_context(trials[0], text, 0))
    assert shots.count("\n") == 4 and all(f"{e.input} => {e.answer}" in shots for e in trials[0].task.train if
                                          f"{e.input} =>" in shots)  # fmt: skip


def test_wrong_answers_that_a_seen_task_would_give_are_counted_as_copied(tasks: TaskSet) -> None:
    trials = make_trials(tasks)
    known = steering_summaries.answers_by_input(tasks)
    own = []
    for trial in trials:
        name = {0: "first", 1: "copy", 2: "back", 3: "nothing"}[trial.number]
        output = OPERATIONS[name](trial.example.input) if name in OPERATIONS else "eeee"
        own.append(Answer(1.0, output == trial.example.answer, output))
    result = steering_summaries.copied_answers(trials, own, tasks, known)
    # back: one right, three wrong, of which two are those of first and copy; ace, deaf, fab, bead are no palindromes.
    assert (result["open"]["wrong"], result["open"]["copied"]) == (3, 2)
    (back,) = result["open"]["tasks"]
    assert {row["task"]: row["times"] for row in back["most_often"]} == {"first": 1, "copy": 1}
    assert result["choice"]["wrong"] == 4 and result["choice"]["copied"] == 2


def test_dependence_on_tasks_is_that_of_the_formed_updates() -> None:
    rng = np.random.default_rng(0)
    names = ["a", "a", "b", "b", "b", "c", "c"]
    updates = rng.normal(size=(7, 30)) + rng.normal(size=30)
    found = steering_summaries.dependence_on_tasks(updates @ updates.T, names)
    means = np.stack([updates[[i for i, n in enumerate(names) if n == name]].mean(0) for name in "abc"])
    centre = means.mean(0)
    variance = np.square(means - centre).sum(1).mean()
    assert found["relative_variance"] == pytest.approx(variance / np.square(centre).sum())
    shares = np.linalg.svd(means, compute_uv=False) ** 2
    shares /= shares.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    distance = {
        same: np.mean(
            [
                np.square(updates[i] - updates[j]).sum()
                for i in range(7)
                for j in range(7)
                if i != j and (names[i] == names[j]) == same
            ]
        )
        for same in (True, False)
    }
    assert found["wordings_over_tasks"] == pytest.approx(distance[True] / distance[False])


def test_what_cannot_be_evaluated_is_refused(make_run: Callable[..., LoadedRun], tasks: TaskSet) -> None:
    run = make_run()

    def refused(match: str, of: TaskSet = tasks, **given: Any) -> None:
        with pytest.raises(EvaluationError, match=match):
            evaluate_tasks(run, of, progress=False, **given)

    untested = replace(tasks.tasks[2], test=())
    refused("no test examples for copy", replace(tasks, tasks=(*tasks.tasks[:2], untested)))
    refused("one task alone", replace(tasks, tasks=tasks.tasks[:1]))
    refused("was trained on tasks", replace(tasks, manifest={"fingerprint": "e" * 64}))
    refused("expected 'tasks' and 'plain_lora'", lora=run)
    plain = make_run({"kind": "plain_lora"})
    refused("description_in_prompt = false", prompted=plain)
    refused("description_in_prompt = true", lora=make_run({"kind": "plain_lora"}, data={"description_in_prompt": True}))
    plain.base.fingerprint = "0" * 64
    refused("was trained on another base", lora=plain)
    refused("data.prompt", lora=make_run({"kind": "plain_lora"}, data={"prompt": "{input}?"}))
    refused("on other tasks", lora=replace(make_run({"kind": "plain_lora"}), data_fingerprint="e" * 64))
    refused("there is no arm 'lora': for which something is missing", arms=["own", "lora"])
    refused("there is no arm 'best'", arms=["best"])


def test_a_prompt_beyond_the_context_is_refused(make_run: Callable[..., LoadedRun], tasks: TaskSet) -> None:
    with pytest.raises(EvaluationError, match=r"arm base\+examples: a prompt with its answer has"):
        evaluate_tasks(make_run(context=34), tasks, progress=False)


def test_a_set_without_held_out_tasks_is_evaluated_and_says_so(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    result = evaluate_tasks(make_run(), replace(tasks, tasks=tasks.seen), arms=["base"], progress=False)
    assert list(result["groups"]) == [TRAINED, NEW]
    assert any("No task was held out" in caveat for caveat in result["caveats"])


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


def test_the_command_writes_the_result_the_tables_and_a_page_with_charts(on_disk: LoadedRun) -> None:
    done = evaluate_run(on_disk, Request(arms=["own", "other", "base"], examples=2), lambda path: on_disk)
    assert json.loads((on_disk.directory / "evaluation.json").read_text()) == done.result
    page, text = done.report.read_text(), (on_disk.directory / "evaluation.md").read_text()
    assert page.count('src="data:image/svg+xml') == 3 and page.count("<table>") == 7
    for words in ("2 of 4 test examples per task", "held out, choice", "base"):
        assert words in page and words in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_seen_and_held_out_tasks_can_be_asked_for_as_such(on_disk: LoadedRun) -> None:
    found = {}
    for word in ("seen", "held-out"):
        request = Request(tasks=[word], arms=["own"], examples=1)
        done = evaluate_run(on_disk, request, lambda path: on_disk)
        found[word] = {row["task"] for row in done.result["tasks"]}
    assert found == {"seen": {"first", "last", "copy", "has_a"}, "held-out": {"back", "lacks_a"}}


@pytest.mark.parametrize("option", ["sentences"])
def test_an_option_of_another_kind_of_data_is_refused(on_disk: LoadedRun, option: str) -> None:
    with pytest.raises(EvaluationError, match=f"--{option} does not apply to a run on tasks"):
        evaluate_run(on_disk, Request(**{option: 3}), lambda path: on_disk)


def test_the_recovered_gain_is_that_of_the_own_adapter_over_that_of_the_tasks_lora(
    make_run: Callable[..., LoadedRun], tasks: TaskSet
) -> None:
    trials = [trial for trial in make_trials(tasks) if trial.group == TRAINED and trial.task.answers == "open"]
    base = [Answer(4.0, False, None) for _ in trials]
    library = [Answer(1.0, trial.number > 0, None) for trial in trials]  # 3 of 4 right, 3 nats better
    own = [Answer(2.5, trial.number == 1, None) for trial in trials]  # 1 of 4 right, 1.5 nats better
    answers = {"own": own, "base": base, "library": library}
    settings = make_run().config.evaluation
    recovered = steering_summaries.group_summaries(trials, answers, settings)[TRAINED]["open"]["recovered"]
    assert recovered["exact"]["value"] == pytest.approx(1 / 3)
    assert recovered["loss"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5, "resamples": 200})
    answers["library"] = base
    recovered = steering_summaries.group_summaries(trials, answers, settings)[TRAINED]["open"]["recovered"]
    assert recovered == {"exact": None, "loss": None}


def test_tasks_of_a_library_are_evaluated_alone_when_named(on_disk: LoadedRun, tmp_path: Path) -> None:
    description = task_set(tmp_path).task("first").descriptions[0]
    for name in ("first", "copy"):
        generate_adapter(on_disk, f"description:{description}", tmp_path / "library" / name)
    request = Request(library=tmp_path / "library", arms=["own", "base", "library"])
    with pytest.raises(EvaluationError, match="has no adapter for last, has_a, back"):
        evaluate_run(on_disk, request, lambda path: on_disk)
    done = evaluate_run(on_disk, replace(request, tasks=["fir*", "copy"]), lambda path: on_disk)
    assert {row["task"] for row in done.result["tasks"]} == {"first", "copy"}
    assert "2 of 6 tasks" in done.result["reduced"]
    assert "that the generated adapter recovers" in (on_disk.directory / "evaluation.md").read_text()
