"""The builtin tasks: small ones over sentences, words, numbers and puzzles, with descriptions in many wordings.

Most tasks come in families over the same inputs, so that nothing but the description tells which of them is wanted.
Some are never trained on (`seen` is False); each of those recombines what trained tasks show, for example the last word
of a list, in capitals, where the last word as it is and the first in capitals are trained. Everything is drawn from
local generators seeded with the seed and the family's name.
"""

from __future__ import annotations

import logging
from importlib.resources import files
from random import Random

import yaml

from hl_scale.data.builtin import numbers, puzzles, sentences, words
from hl_scale.data.builtin.family import BuiltinTaskError, Family
from hl_scale.data.tasks import Task

logger = logging.getLogger(__name__)

FAMILIES: tuple[Family, ...] = (
    sentences.FAMILY,
    words.LIST_FAMILY,
    words.NOUN_FAMILY,
    numbers.FAMILY,
    *puzzles.FAMILIES,
)


def builtin_tasks(seed: int, training_examples: int, test_examples: int) -> list[Task]:
    """All builtin tasks, always in the same order.

    Args:
        seed: of the inputs that are drawn; the wordings do not depend on it.
        training_examples: examples per task for training; a family with fewer distinct inputs gives what it has.
        test_examples: examples per task for evaluation; the inputs are no training inputs of any task of the family.

    Raises:
        BuiltinTaskError: a family has not even one training input beside the test inputs, or reasoning-gym is missing.
        ResourceError: the scored sentences cannot be had.
    """
    wordings = _wordings()
    tasks = []
    for family in FAMILIES:
        items = family.draw(Random(f"{seed}|{family.name}"), training_examples + test_examples)
        test, train = items[:test_examples], items[test_examples:]
        if not train:
            raise BuiltinTaskError(
                f"builtin tasks {family.name!r}: {test_examples} test examples leave none of {len(items)} inputs for "
                "training\n  fix: lower data.test_examples"
            )
        if len(train) < training_examples:
            logger.warning(
                "builtin tasks %s: %d training examples each, %d were asked for",
                family.name, len(train), training_examples,
            )  # fmt: skip
        tasks += [
            Task(
                name=operation.name,
                family=family.name,
                answers=operation.answers,
                descriptions=tuple(wordings[operation.name]["train"]),
                heldout_descriptions=tuple(wordings[operation.name]["heldout"]),
                train=family.examples(operation, train),
                test=family.examples(operation, test),
                seen=operation.seen,
                checker=operation.checker,
            )
            for operation in family.operations
        ]
    return tasks


def reference_wordings(each: int = 2) -> list[str]:
    """The first training wordings of every task: texts to know an encoder's states by, the same on every machine."""
    return [text for wording in _wordings().values() for text in wording["train"][:each]]


def _wordings() -> dict[str, dict[str, list[str]]]:
    """Task -> "train" and "heldout" -> wordings."""
    found: dict[str, dict[str, list[str]]] = yaml.safe_load(
        (files(__name__) / "descriptions.yaml").read_text(encoding="utf-8")
    )
    return found
