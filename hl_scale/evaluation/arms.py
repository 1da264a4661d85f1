"""Arms of the task evaluation: what a model reads before a prompt, and which adapter it carries.

"The base" of a run that was trained on top of a frozen adapter is the base that carries it, in all arms but `library`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from hl_scale.base import AdaptedModel, TaskAdapter
from hl_scale.conditions.descriptions import EncoderError, Vectors, random_direction
from hl_scale.engine.conditions import DescriptionConditions, OneHotConditions
from hl_scale.engine.run import LoadedRun, composed_factors
from hl_scale.engine.supervised import PromptFormat
from hl_scale.evaluation.measurement import EvaluationError
from hl_scale.evaluation.trials import GROUPS, Trial
from hl_scale.lora import LoraFactors

OWN, OTHER, RANDOM, SHUFFLED = "own", "other", "random", "shuffled"
BASE, DESCRIBED, EXAMPLES = "base", "base+description", "base+examples"
LORA, PROMPTED, LIBRARY = "lora", "prompted", "library"
IN_CONTEXT = 4
ARMS = {
    OWN: "the adapter generated from the task's description",
    OTHER: "the adapter generated from a description of another task, one over the same inputs where there is one",
    RANDOM: "the adapter generated from a random vector as long as a description's",
    SHUFFLED: "the adapter generated from the words of the description in random order",
    BASE: "the base without an adapter",
    DESCRIBED: "the base without an adapter, which reads a description of the task before the prompt",
    EXAMPLES: f"the base without an adapter, which reads {IN_CONTEXT} training examples of the task before the prompt",
    LORA: "one plain LoRA trained on the same tasks, which is told nothing of the task",
    PROMPTED: "one plain LoRA trained on the same tasks, which reads the description before the prompt",
    LIBRARY: "a LoRA trained on this task alone",
}
"""What each arm is, in the order of tables."""


class AdapterLibrary(Protocol):
    """LoRAs by the name of their task, see `hl_scale.data.library`."""

    def read_all(self, names: Sequence[str]) -> LoraFactors:
        """Factors of several tasks, E of them."""


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: one of `ARMS`.
        base: the model that answers.
        by_wording: whether it matters which wordings were trained on; if not, an example is asked once for all its
            groups, under its first wording.
        head: trial -> tokens between the start and the prompt.
        factors: trials -> adapters, one per trial (E = len) or one for all (E = 1), or None.
    """

    name: str
    base: AdaptedModel
    by_wording: bool = True
    head: Callable[[Trial], list[int]] = lambda trial: []
    factors: Callable[[Sequence[Trial]], LoraFactors | None] = lambda trials: None


class TrialVectors:
    """Condition vectors (C,) of trials: of their own and the other description, shuffled words, and random ones.

    Texts of an arm are embedded when its first vector is asked for.
    """

    def __init__(
        self, conditions: DescriptionConditions | OneHotConditions, trials: Sequence[Trial], seed: int
    ) -> None:
        self.conditions, self.trials, self.seed = conditions, trials, seed
        self.tasks = list(dict.fromkeys(trial.task.name for trial in trials))
        self._embeddings: dict[str, dict[str, Vectors]] = {}

    def vector(self, trial: Trial, arm: str) -> Vectors:
        """(C,) of an arm that generates its adapter."""
        task = trial.other if arm == OTHER else trial.task
        if isinstance(self.conditions, OneHotConditions):
            return self._random(trial, self.conditions.size) if arm == RANDOM else self.conditions.parse(
                f"task:{task.name}"
            ).vector  # fmt: skip
        if arm == RANDOM:
            embedding = self._random(trial, self.conditions.encoder.width)
        else:
            embedding = self._embedded(arm, self.conditions)[self._text(trial, arm)]
        return self.conditions.vectors(embedding[None], task.variety)[0]

    def _text(self, trial: Trial, arm: str) -> str:
        if arm == SHUFFLED:
            return self.shuffle(trial)
        return trial.other_description if arm == OTHER else trial.description

    def _embedded(self, arm: str, conditions: DescriptionConditions) -> dict[str, Vectors]:
        """Embeddings of an arm's texts."""
        if arm not in self._embeddings:
            texts = list(dict.fromkeys(self._text(trial, arm) for trial in self.trials))
            self._embeddings[arm] = dict(zip(texts, conditions.embed(texts), strict=True))
        return self._embeddings[arm]

    def shuffle(self, trial: Trial) -> str:
        """The words of a description in an order that its task and wording decide.

        In another order words may have more tokens: the last ones are left out until the encoder reads the rest.
        """
        words = trial.description.split()
        words = [words[i] for i in self._generator(trial).permutation(len(words))]
        while len(words) > 1 and not self._is_read(" ".join(words)):
            words.pop()
        return " ".join(words)

    def _is_read(self, text: str) -> bool:
        if isinstance(self.conditions, DescriptionConditions):
            try:
                self.conditions.encoder.check([text])
            except EncoderError:
                return False
        return True

    def _random(self, trial: Trial, width: int) -> Vectors:
        return random_direction(self._generator(trial), width)

    def _generator(self, trial: Trial) -> np.random.Generator:
        place = [self.tasks.index(trial.task.name), list(GROUPS).index(trial.group), trial.wording]
        return np.random.default_rng([self.seed, *place])


def generated_factors(
    run: LoadedRun, vectors: Sequence[Vectors], task_adapter: TaskAdapter | None = None
) -> LoraFactors:
    """`composed_factors` of condition vectors, each distinct one once; E = len(vectors), or 1 if they play no part."""
    distinct, index = np.unique(np.stack(vectors), axis=0, return_inverse=True)
    factors = composed_factors(run, torch.from_numpy(distinct), task_adapter)
    return factors if factors.conditions == 1 else factors.select(torch.from_numpy(index.reshape(-1)))


def make_arms(
    run: LoadedRun,
    text: PromptFormat,
    vectors: TrialVectors,
    *,
    lora: LoadedRun | None = None,
    prompted: LoadedRun | None = None,
    library: AdapterLibrary | None = None,
) -> dict[str, Arm]:
    """All arms that what is given allows, in the order of `ARMS`."""

    def generated(name: str) -> Arm:
        def factors(trials: Sequence[Trial]) -> LoraFactors:
            return generated_factors(run, [vectors.vector(trial, name) for trial in trials], run.task_adapter)

        return Arm(name, run.base, by_wording=name != RANDOM, factors=factors)

    names = [OWN, OTHER, RANDOM] + ([] if isinstance(run.conditions, OneHotConditions) else [SHUFFLED])
    arms = [generated(name) for name in names]
    # None of these knows which wordings were trained on.
    device = next(run.hypernetwork.parameters()).device
    alone = None if run.task_adapter is None else run.task_adapter.factors.to(device)
    heads: dict[str, Callable[[Trial], list[int]]] = {
        BASE: lambda trial: [],
        DESCRIBED: _described(text),
        EXAMPLES: lambda trial: in_context(trial, text, vectors.seed),
    }
    arms += [
        Arm(name, run.base, by_wording=False, head=head, factors=lambda trials: alone) for name, head in heads.items()
    ]
    if lora is not None:
        arms.append(Arm(LORA, lora.base, by_wording=False, factors=_shared_factors(lora)))
    if prompted is not None:
        arms.append(Arm(PROMPTED, prompted.base, head=_described(text), factors=_shared_factors(prompted)))
    if library is not None:
        arms.append(
            Arm(LIBRARY, run.base, by_wording=False, factors=lambda trials: library_factors(library, trials))
        )  # fmt: skip
    return {arm.name: arm for arm in arms}


def _described(text: PromptFormat) -> Callable[[Trial], list[int]]:
    return lambda trial: text.description(trial.description)


def _shared_factors(control: LoadedRun) -> Callable[[Sequence[Trial]], LoraFactors | None]:
    """The one adapter of a plain LoRA, whatever is asked."""
    factors = composed_factors(control, torch.zeros(control.conditions.size), control.task_adapter)
    return lambda trials: factors


def library_factors(library: AdapterLibrary, trials: Sequence[Trial]) -> LoraFactors:
    """Adapters of the trials' tasks, each read once."""
    names = list(dict.fromkeys(trial.task.name for trial in trials))
    index = torch.tensor([names.index(trial.task.name) for trial in trials])
    return library.read_all(names).select(index)


def in_context(trial: Trial, text: PromptFormat, seed: int) -> list[int]:
    """Training examples of a trial's task with their answers, the same for all its trials."""
    train = trial.task.train
    chosen = np.random.default_rng(seed).permutation(len(train))[:IN_CONTEXT]
    return [token for i in chosen for token in text.prompt(train[i].input) + text.answer(train[i])]


def chosen_arms(arms: dict[str, Arm], names: Sequence[str] | None) -> dict[str, Arm]:
    """Those of the names, and `own`, which all others are compared with.

    Raises:
        EvaluationError: an arm that does not exist, or whose run or library was not given.
    """
    if names is None:
        return arms
    for name in names:
        if name not in arms:
            given = f"one of {', '.join(ARMS)}" if name not in ARMS else "for which something is missing here"
            raise EvaluationError(
                f"there is no arm {name!r}: {given}\n"
                f"  fix: choose among {', '.join(arms)}; lora, prompted and library need --control, --prompted and "
                "--library"
            )
    return {name: arm for name, arm in arms.items() if name == OWN or name in names}
