"""Pairs of two-digit numbers: which, how much, in what order."""

from __future__ import annotations

from random import Random

from hl_scale.data.builtin.family import Family, Operation, balanced

Pair = tuple[int, int]


def draw(random: Random, count: int) -> list[Pair]:
    """Distinct pairs of different numbers from 10 to 99; the larger one comes first in half of them."""
    pairs = [(first, second) for first in range(10, 100) for second in range(10, first)]
    random.shuffle(pairs)
    half = len(pairs) // 2
    return balanced([(pairs[:half], 1), ([pair[::-1] for pair in pairs[half:]], 1)], random)[:count]


FAMILY = Family(
    "numbers",
    draw,
    (
        Operation("numbers.larger", lambda pair: str(max(pair))),
        Operation("numbers.smaller", lambda pair: str(min(pair))),
        Operation("numbers.first", lambda pair: str(pair[0])),
        Operation("numbers.second", lambda pair: str(pair[1])),
        Operation("numbers.sum", lambda pair: str(sum(pair))),
        Operation("numbers.difference", lambda pair: str(abs(pair[0] - pair[1]))),
        Operation("numbers.larger_units", lambda pair: str(max(pair) % 10)),
        Operation("numbers.smaller_units", lambda pair: str(min(pair) % 10), seen=False),
        Operation("numbers.first_plus_one", lambda pair: str(pair[0] + 1)),
        Operation("numbers.second_plus_one", lambda pair: str(pair[1] + 1), seen=False),
        Operation("numbers.swapped", lambda pair: f"{pair[1]} {pair[0]}"),
        Operation("numbers.sign", lambda pair: "<" if pair[0] < pair[1] else ">", answers="choice"),
    ),
    input=lambda pair: f"{pair[0]} {pair[1]}",
)
