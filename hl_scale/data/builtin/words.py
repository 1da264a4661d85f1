"""Single words, and lists of three or four: positions, letters, order, meaning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from random import Random

import yaml

from hl_scale.data.builtin.family import Family, Operation, balanced

_LIVING = ("animal", "person")


@dataclass(frozen=True)
class Noun:
    text: str
    category: str

    @property
    def living(self) -> bool:
        return self.category in _LIVING


@cache
def nouns() -> tuple[Noun, ...]:
    """Common countable nouns with a regular plural, by category (nouns.yaml)."""
    text = (files("hl_scale.data.builtin") / "nouns.yaml").read_text(encoding="utf-8")
    return tuple(Noun(word, category) for category, words in yaml.safe_load(text).items() for word in words.split())


def draw_nouns(random: Random, count: int) -> list[Noun]:
    """Half of them living, and of each half one half with the letter e."""
    strata: dict[tuple[bool, bool], list[Noun]] = {(a, b): [] for a in (True, False) for b in (True, False)}
    for noun in nouns():
        strata[noun.living, "e" in noun.text].append(noun)
    return balanced([(stratum, 1) for stratum in strata.values()], random)[:count]


def draw_lists(random: Random, count: int) -> list[tuple[str, ...]]:
    """Distinct lists, half of three and half of four words; one word is the longest and another the shortest."""
    words = [noun.text for noun in nouns() if len(noun.text) <= 7]
    lists: list[tuple[str, ...]] = []
    known: set[tuple[str, ...]] = set()
    while len(lists) < count:
        words_of_list = tuple(random.sample(words, 3 + len(lists) % 2))
        lengths = sorted(len(word) for word in words_of_list)
        if words_of_list not in known and lengths[0] < lengths[1] and lengths[-2] < lengths[-1]:
            known.add(words_of_list)
            lists.append(words_of_list)
    return lists


def plural(word: str) -> str:
    """The regular English plural."""
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


NOUN_FAMILY = Family(
    "word",
    draw_nouns,
    (
        Operation("word.spelled", lambda noun: " ".join(noun.text)),
        Operation("word.spelled_upper", lambda noun: " ".join(noun.text.upper()), seen=False),
        Operation("word.upper", lambda noun: noun.text.upper()),
        Operation("word.capitalised", lambda noun: noun.text.capitalize()),
        Operation("word.first_letter", lambda noun: noun.text[0]),
        Operation("word.last_letter", lambda noun: noun.text[-1]),
        Operation("word.length", lambda noun: str(len(noun.text))),
        Operation("word.vowels", lambda noun: " ".join(letter for letter in noun.text if letter in "aeiou")),
        Operation("word.plural", lambda noun: plural(noun.text)),
        Operation("word.plural_upper", lambda noun: plural(noun.text).upper(), seen=False),
        Operation("word.has_e", lambda noun: _yes("e" in noun.text), answers="choice"),
        Operation("word.living", lambda noun: "alive" if noun.living else "thing", answers="choice"),
        Operation("word.category", lambda noun: noun.category),
    ),
    input=lambda noun: noun.text,
)

LIST_FAMILY = Family(
    "words",
    draw_lists,
    (
        Operation("words.first", lambda words: words[0]),
        Operation("words.second", lambda words: words[1]),
        Operation("words.last", lambda words: words[-1]),
        Operation("words.longest", lambda words: max(words, key=len)),
        Operation("words.shortest", lambda words: min(words, key=len)),
        Operation("words.alphabet_first", lambda words: min(words)),
        Operation("words.alphabet_last", lambda words: max(words)),
        Operation("words.first_initial", lambda words: words[0][0]),
        Operation("words.last_final", lambda words: words[-1][-1]),
        Operation("words.upper_first", lambda words: words[0].upper()),
        Operation("words.upper_last", lambda words: words[-1].upper(), seen=False),
        Operation("words.count", lambda words: str(len(words)), answers="choice"),
        Operation("words.reversed", lambda words: " ".join(reversed(words))),
        Operation("words.hyphenated", lambda words: "-".join(words)),
        Operation("words.first_twice", lambda words: f"{words[0]} {words[0]}"),
        Operation("words.drop_first", lambda words: " ".join(words[1:])),
        Operation("words.drop_last", lambda words: " ".join(words[:-1]), seen=False),
        Operation("words.initials", lambda words: " ".join(word[0] for word in words)),
    ),
    input=" ".join,
)
