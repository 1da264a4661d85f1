"""Short puzzles of reasoning-gym, written as bare data: their own wordings of the question are left out.

reasoning-gym (Apache-2.0) generates the entries and scores the answers. Inputs look like those of the other families
where they can: two numbers may ask for a sum, their greatest common divisor, or the second of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from hl_scale.data.builtin.family import BuiltinTaskError, Family, Operation

Entry = dict[str, Any]
_TRIES_PER_EXAMPLE = 30
_LARGEST_SHARE = 0.4
"""No answer of a puzzle makes up more of its examples: a greatest common divisor would mostly be 1."""


@dataclass(frozen=True)
class Puzzle:
    """A dataset of reasoning-gym: its settings, the data of an entry, and which entries to keep."""

    dataset: str
    settings: dict[str, Any]
    input: Callable[[Entry], str]
    """Metadata of an entry -> its data, without the question."""
    keep: Callable[[Entry], bool] = lambda metadata: True

    def draw(self, random: Random, count: int) -> list[Entry]:
        """At most `count` entries with distinct inputs; fewer where the settings have no more."""
        try:
            import reasoning_gym
        except ImportError:
            raise BuiltinTaskError(
                "the builtin tasks need reasoning-gym\n  fix: pip install reasoning-gym==0.1.25, or leave the builtin "
                "source out of data.sources"
            ) from None
        tries = count * _TRIES_PER_EXAMPLE
        dataset = reasoning_gym.create_dataset(self.dataset, size=tries, seed=random.randrange(2**31), **self.settings)
        entries: dict[str, Entry] = {}
        answers: Counter[str] = Counter()
        for number in range(tries):
            entry = dataset[number]
            text, answer = self.input(entry["metadata"]), str(entry["answer"])
            if text in entries or not self.keep(entry["metadata"]) or answers[answer] >= _LARGEST_SHARE * count:
                continue
            entries[text] = entry
            answers[answer] += 1
            if len(entries) == count:
                break
        return random.sample(list(entries.values()), len(entries))


def _animals(metadata: Entry) -> str:
    return ", ".join(f"{number} {animal}" for animal, number in metadata["animals"].items())


def _lower_case(key: str) -> Callable[[Entry], bool]:
    return lambda metadata: all(word.isalpha() and word.islower() for word in metadata[key])


def _numbers(metadata: Entry) -> str:
    return " ".join(map(str, metadata["numbers"]))


_PUZZLES = (
    Puzzle("chain_sum", {"min_terms": 3, "max_terms": 3, "max_digits": 1}, lambda entry: entry["expression"]),
    Puzzle(
        "simple_equations",
        {"max_terms": 2, "max_value": 9, "operators": ("+",), "operators_weights": [1.0]},
        lambda entry: entry["equation"],
    ),
    Puzzle(
        "letter_counting",
        {"min_words": 1, "max_words": 3},
        lambda entry: f"{entry['target_letter']}: {' '.join(entry['span'])}",
        _lower_case("span"),
    ),
    Puzzle(
        "spell_backward",
        {"min_word_len": 3, "max_word_len": 4},
        lambda entry: entry["word"],
        lambda entry: entry["word"].islower(),
    ),
    Puzzle("leg_counting", {"min_animals": 1, "max_animals": 2, "max_instances": 3}, _animals),
    Puzzle("gcd", {"min_value": 2, "max_value": 40}, _numbers),
    Puzzle("lcm", {"min_value": 2, "max_value": 20}, _numbers),
    Puzzle(
        "fraction_simplification",
        {"max_value": 12, "min_factor": 2, "max_factor": 9, "styles": ("plain",)},
        lambda entry: f"{entry['numerator']}/{entry['denominator']}",
    ),
    Puzzle(
        "word_sorting",
        {"min_words": 2, "max_words": 3, "max_word_length": 7},
        lambda entry: ", ".join(entry["original_words"]),
        lambda entry: entry["direction"] == "ascending" and _lower_case("original_words")(entry),
    ),
    Puzzle(
        "word_sequence_reversal",
        {"min_words": 3, "max_words": 3},
        lambda entry: ", ".join(entry["words"]),
        lambda entry: _lower_case("words")(entry) and max(map(len, entry["words"])) <= 7,
    ),
)


def _metadata(entry: Entry) -> str:
    """What the scorers read: the metadata, less the difficulty settings that every entry repeats."""
    kept = {key: value for key, value in entry["metadata"].items() if key != "difficulty"}
    return json.dumps(kept, sort_keys=True)


def _family(puzzle: Puzzle) -> Family:
    name = f"puzzle.{puzzle.dataset}"
    return Family(
        name,
        puzzle.draw,
        (Operation(name, lambda entry: str(entry["answer"]), checker=f"reasoning_gym:{puzzle.dataset}"),),
        input=lambda entry: puzzle.input(entry["metadata"]),
        metadata=_metadata,
    )


FAMILIES = tuple(_family(puzzle) for puzzle in _PUZZLES)
