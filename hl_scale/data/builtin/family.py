"""A family of tasks: inputs drawn once, and operations that each turn every one of them into an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from hl_scale.data.tasks import Example


class BuiltinTaskError(ValueError):
    """The builtin tasks cannot be made; the message says why and how to fix it."""


@dataclass(frozen=True)
class Operation:
    """One task of a family: `answer` maps an item, whatever the family draws, to the answer."""

    name: str
    answer: Callable[[Any], str]
    answers: Literal["open", "choice"] = "open"
    seen: bool = True
    checker: str = "exact"


@dataclass(frozen=True)
class Family:
    """Items drawn with a generator of their own, how to write one as an input, and what is asked about it."""

    name: str
    draw: Callable[[Random, int], list[Any]]
    """(generator, count) -> at most `count` items with distinct inputs, in an order any prefix of which is balanced."""
    operations: tuple[Operation, ...]
    input: Callable[[Any], str] = str
    metadata: Callable[[Any], str] = lambda item: ""

    def examples(self, operation: Operation, items: Iterable[Any]) -> tuple[Example, ...]:
        return tuple(Example(self.input(item), operation.answer(item), self.metadata(item)) for item in items)


def balanced(strata: Sequence[tuple[list[Any], int]], random: Random) -> list[Any]:
    """Shuffle each stratum and deal from all of them in rounds, `weight` items of each a round, until one runs out.

    Args:
        strata: (items, weight) pairs.
        random: what shuffles, the strata first and then each round.
    """
    piles = [random.sample(items, len(items)) for items, _ in strata]
    rounds = min(len(items) // weight for items, weight in strata)
    dealt = []
    for number in range(rounds):
        dealing = []
        for pile, (_, weight) in zip(piles, strata, strict=True):
            dealing += pile[number * weight : (number + 1) * weight]
        random.shuffle(dealing)
        dealt += dealing
    return dealt
