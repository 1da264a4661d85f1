"""Greedy answers and losses of trials under one arm.

One pass over prompt and right answer gives the loss, and the greedy token at every place up to the first wrong one.
Where that settles whether the greedy output is right, no more is computed; else the output is generated. Outcomes are
those of generating everything: greedy decoding follows the right answer up to that first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hl_scale.base import AdaptedModel
from hl_scale.data.checkers import check
from hl_scale.engine.supervised import PromptFormat, task_batch
from hl_scale.evaluation.arms import Arm
from hl_scale.evaluation.measurement import EvaluationError
from hl_scale.evaluation.trials import Trial

LOGIT_ROWS = 128
"""Logits exist for so many tokens at a time."""


@dataclass(frozen=True)
class Answer:
    """Of one trial: loss of the right answer (nats per token, its end included), the output as far as known, verdict.

    `output` is None where the output was settled to be wrong before all of it was known.
    """

    loss: float
    right: bool
    output: str | None


@dataclass(frozen=True)
class _Asked:
    trial: Trial
    prompt: list[int]
    answer: list[int]


class Answerer:
    """Asks trials.

    Args:
        text: how examples are put.
        batch_size: most rows of a forward pass.
        advance: called with the number of trials that were just answered.
    """

    def __init__(self, text: PromptFormat, batch_size: int, advance: Callable[[int], None] = lambda done: None) -> None:
        self.text, self.batch_size, self.advance = text, batch_size, advance
        end_of_text = text.tokenizer.eos_token_id
        self.stop_ids = {*text.end[: 1 if len(text.end) == 1 else 0], *([] if end_of_text is None else [end_of_text])}

    def answers(self, arm: Arm, trials: Sequence[Trial], *, all_outputs: bool = False) -> list[Answer]:
        """Answers in the order of trials.

        Args:
            arm: who answers.
            trials: what is asked.
            all_outputs: generate every output, also where the verdict is known before.

        Raises:
            EvaluationError: a prompt with its answer is longer than the context.
        """
        asked: list[_Asked] = []
        rows = []
        positions: dict[tuple[str, int], int] = {}
        for trial in trials:
            key = (trial.task.name, trial.number)
            if arm.by_wording or key not in positions:
                positions[key] = len(asked)
                asked.append(self._asked(arm, trial))
            rows.append(positions[key])
        found: list[Answer] = [Answer(0.0, False, None)] * len(asked)
        open_rows = []
        for batch in self._batches(asked, lambda a: len(a.prompt) + len(a.answer)):
            losses, greedy = self._scored(arm, [asked[row] for row in batch])
            for row, loss, tokens in zip(batch, losses, greedy, strict=True):
                right, output = self._settled(asked[row], tokens)
                found[row] = Answer(loss, bool(right), output)
                if right is None or (all_outputs and output is None):
                    open_rows.append(row)
            self.advance(len(batch))
        # By answers: a batch goes on for as long as its longest may take.
        for batch in self._batches([asked[row] for row in open_rows], lambda a: (len(a.answer), len(a.prompt))):
            part = [open_rows[row] for row in batch]
            for row, verdict in zip(part, self._generated(arm, [asked[row] for row in part]), strict=True):
                found[row] = Answer(found[row].loss, *verdict)
        return [found[row] for row in rows]

    def passes(self, arm: Arm, trials: Sequence[Trial]) -> int:
        """How many `advance` will be told of."""
        return len(trials) if arm.by_wording else len({(trial.task.name, trial.number) for trial in trials})

    def _asked(self, arm: Arm, trial: Trial) -> _Asked:
        prompt = self.text.start + arm.head(trial) + self.text.prompt(trial.example.input)
        answer = self.text.answer(trial.example)
        if len(prompt) + len(answer) + 2 > arm.base.context_length:
            raise EvaluationError(
                f"task {trial.task.name}, arm {arm.name}: a prompt with its answer has {len(prompt) + len(answer)} "
                f"tokens, the model's context holds {arm.base.context_length}\n  fix: leave out the arm with --arms, "
                "or the task with data.tasks"
            )
        return _Asked(trial, prompt, answer)

    def _batches(self, asked: Sequence[_Asked], length: Callable[[_Asked], Any]) -> Iterator[list[int]]:
        """Rows of each batch, neighbours in length."""
        order = sorted(range(len(asked)), key=lambda row: length(asked[row]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    @torch.inference_mode()
    def _scored(self, arm: Arm, asked: Sequence[_Asked]) -> tuple[list[float], list[list[int]]]:
        """Mean loss of each right answer, and the greedy token at each of its places."""
        device = next(arm.base.model.parameters()).device
        nothing = torch.zeros(1, 1).numpy()
        batch = task_batch([(a.prompt, a.answer) for a in asked], nothing, [0] * len(asked), [0] * len(asked))
        batch = batch.to(device)
        predicting = torch.zeros_like(batch.answers)
        predicting[:, :-1] = batch.answers[:, 1:]
        factors = arm.factors([a.trial for a in asked])
        states = arm.base.hidden_states(batch.input_ids, batch.attention_mask, factors)[predicting]
        losses, greedy = _losses_and_greedy(arm.base, states, batch.input_ids[batch.answers])
        sizes = [len(a.answer) for a in asked]
        return (
            [part.double().mean().item() for part in losses.split(sizes)],
            [part.tolist() for part in greedy.split(sizes)],
        )

    def _settled(self, asked: _Asked, greedy: Sequence[int]) -> tuple[bool | None, str | None]:
        """Verdict, None where it takes the whole output, and the output where it is whole."""
        places = zip(asked.answer, greedy, strict=True)
        first_wrong = next((i for i, (right, chosen) in enumerate(places) if right != chosen), None)
        if first_wrong is None:
            return self._verdict(asked, asked.answer)
        begun = [*asked.answer[:first_wrong], greedy[first_wrong]]
        if begun[-1] in self.stop_ids:
            return self._verdict(asked, begun[:-1])
        text = self._decoded(begun)
        if "\n" in text or (self.text.data.answer_end and self.text.data.answer_end in text):
            return self._verdict(asked, begun)
        # A token may begin the right answer in other pieces, or hold part of a character.
        may_be_right = (
            asked.trial.task.checker != "exact"
            or "\ufffd" in text
            or asked.trial.example.answer.strip().startswith(text.strip())
        )
        return (None if may_be_right else False), None

    @torch.inference_mode()
    def _generated(self, arm: Arm, asked: Sequence[_Asked]) -> list[tuple[bool, str]]:
        """Verdicts and outputs."""
        device = next(arm.base.model.parameters()).device
        shape = (len(asked), max(len(a.prompt) for a in asked))
        input_ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, a in enumerate(asked):
            input_ids[row, shape[1] - len(a.prompt) :] = torch.tensor(a.prompt)
            mask[row, shape[1] - len(a.prompt) :] = 1
        found = arm.base.generate(
            input_ids.to(device), mask.to(device), arm.factors([a.trial for a in asked]),
            max_new_tokens=max(len(a.answer) for a in asked) + 2, stop_ids=self.stop_ids,
        )  # fmt: skip
        return [self._verdict(a, tokens) for a, tokens in zip(asked, found, strict=True)]

    def _verdict(self, asked: _Asked, tokens: Sequence[int]) -> tuple[bool, str]:
        """Whether a whole output is right, and its first line."""
        text, end = self._decoded(tokens), self.text.data.answer_end
        text = text.partition(end)[0] if end else text
        return check(asked.trial.task, asked.trial.example, text), text.partition("\n")[0].strip()

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.text.tokenizer.decode(list(tokens), skip_special_tokens=True))


def _losses_and_greedy(base: AdaptedModel, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """States (N, D) before tokens (N,) -> their losses (N,) in nats, and the likeliest tokens (N,)."""
    losses, greedy = [], []
    for part, right in zip(states.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = base.output_head(part).float()
        if base.logit_softcap is not None:
            logits = torch.tanh(logits / base.logit_softcap) * base.logit_softcap
        losses.append(torch.nn.functional.cross_entropy(logits, right, reduction="none"))
        greedy.append(logits.argmax(1))
    return torch.cat(losses), torch.cat(greedy)
