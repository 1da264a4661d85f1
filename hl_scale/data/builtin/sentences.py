"""Short scored sentences from film reviews, newspapers and product reviews: what they feel, where they are from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from hl_scale.data.builtin.family import Family, Operation, balanced
from hl_scale.data.sentences import read_scored_vader

_WEIGHTS = {"movie": 2, "news": 1, "product": 1}
"""Half of the sentences are about films, so that yes and no are equally frequent."""
_MINIMUM_SCORE = 1.0
"""Mean human rating, from -4 to 4, below which (in size) a sentence counts as neutral and is left out."""
_PLAIN = re.compile(r"[a-z]+( [a-z0-9]+(['-][a-z0-9]+)*[,;:]?){2,10} [a-z]+")


@dataclass(frozen=True)
class ScoredSentence:
    text: str
    source: str
    positive: bool


def draw(random: Random, count: int) -> list[ScoredSentence]:
    """Lower-case sentences of 4 to 12 words without the final stop; positive and negative ones are equally many."""
    strata = []
    known: set[str] = set()
    for source, weight in _WEIGHTS.items():
        sides: dict[bool, list[ScoredSentence]] = {True: [], False: []}
        for score, raw in read_scored_vader(source):
            text = " ".join(raw.split()).lower().rstrip(".!?")
            if abs(score) >= _MINIMUM_SCORE and text not in known and _PLAIN.fullmatch(text):
                known.add(text)
                sides[score > 0].append(ScoredSentence(text, source, score > 0))
        strata += [(sentences, weight) for sentences in sides.values()]
    return balanced(strata, random)[:count]


def _sentiment(name: str, positive: str, negative: str, seen: bool = True) -> Operation:
    return Operation(
        f"sentence.{name}", lambda item: positive if item.positive else negative, answers="choice", seen=seen
    )


def _source(name: str, movie: str, news: str, product: str, seen: bool = True) -> Operation:
    labels = {"movie": movie, "news": news, "product": product}
    return Operation(f"sentence.{name}", lambda item: labels[item.source], answers="choice", seen=seen)


FAMILY = Family(
    "sentence",
    draw,
    (
        _sentiment("good_bad", "good", "bad"),
        _sentiment("one_zero", "1", "0"),
        _sentiment("up_down", "up", "down"),
        _sentiment("happy_sad", "happy", "sad"),
        _sentiment("positive_negative", "positive", "negative", seen=False),
        _source("movie_news_product", "movie", "news", "product"),
        _source("a_b_c", "A", "B", "C"),
        _source("is_film", "yes", "no", "no"),
        _source("film_one_zero", "1", "0", "0", seen=False),
        Operation("sentence.first_word", lambda item: item.text.split()[0]),
        Operation("sentence.last_word", lambda item: item.text.split()[-1]),
        Operation("sentence.word_count", lambda item: str(len(item.text.split()))),
    ),
    input=lambda item: item.text,
)
