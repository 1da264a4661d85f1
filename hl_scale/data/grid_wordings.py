"""The phrase grammar that puts a cell of the grid into words.

A description is a frame, a sentence or two with gaps, filled with one phrase for each level of the cell. Every level
and the frames themselves come in two sets that share nothing: `trained` for descriptions to train on, `heldout` for
those to evaluate on. What both sets share are the words of the frames' grammar and what the tasks are about: the
family's nouns ("word", "term"), the labels, "letter". Roles have no fixed place: frames begin with the item, the
operation, the output form or the input.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Literal

from hl_scale.data.grid_phrases import (
    ACTIONS,
    FINISHES,
    LISTS,
    LOOKS,
    NOUNS,
    POSITIONS,
    PREDICATES,
    RESULTS,
    RULES,
    Phrases,
)

Part = Literal["trained", "heldout"]
# From so many words on, an item is set off by a comma from what is said about it.
LONG_ITEM = 4

# {list} the input, {item} the item, {result} and {action} with it in place, {that_result} and {act} with a pronoun.
OPEN_FRAMES = Phrases(
    "{action}, {look}. | what is {result}? {finish}. | you get {list}. {action}, {look}. | take {item}. {act}, then"
    " {finish}. | {result}, {look}. | given {list}, reply with {result}, {look}. | if you are shown {list}, {action}"
    " and {finish}. | from {list} I need {result}; {finish}. | {look}: {result}. | {finish}. The output should be"
    " {result}. | each line holds {list}. What belongs after it is {result}, {look}. | could you {action}, please?"
    " {finish}. | find {item} in {list} and {act}. {finish}. | the answer, {look}, is {result}. | ignore everything"
    " except {item}; {act}, {look}. | on reading {list}, send back {result}, {look}. | {item} is what matters. Of"
    " it, return {that_result}, {look}. | to solve this, look for {item}, {act} and {finish}.",
    "I am going to present {list}, and I would like to see {result}, {look}. | work on {item} alone: {act}; afterwards"
    " {finish}. | {finish} once you have done this to {list}: {action}. | which response fits {list}? It is {result},"
    " {look}. | everything hinges on {item}, as what we are after is {that_result}, {look}.",
)
# {claim} and {it_claims}: the predicate of the item and of "it".
CHOICE_FRAMES = Phrases(
    "is it true that {claim}? {rule}. | {rule}: {claim}. | given {list}, decide whether {claim}. {rule}. | output {p}"
    " if {claim}, otherwise {q}. | if {claim}, the answer is {p}; if not, it is {q}. | write {q} unless {claim}; in"
    " that case write {p}. | look at {item}. Does it hold that {it_claims}? {rule}. | check {item} in {list}: should"
    " you see that {it_claims}, the output is {p}, else {q}. | the label {p} means that {claim}, and {q} that this is"
    " false. | a test on {list}: {claim}. {rule}. | the task is to tell from {list} whether {claim}; {rule}. | there"
    " are two labels, {p} and {q}. The former is for {list} in which {claim}. | {claim}: {p}. Anything else: {q}. |"
    " consider nothing but {item} and find out if {it_claims}. {rule}.",
    "you must judge {list} by one criterion, namely that {claim}; {rule}. | all depends on {item}: {p} provided that"
    " {it_claims}, {q} failing that. | I will show you {list} and want to know if {claim}, in which event respond {p},"
    " and {q} in any other. | suppose {claim}. Then {p} is correct. Suppose the opposite, and {q} is.",
)
_LEVEL_OF = {"that_result": "result", "action": "act", "it_claims": "claim"}


@dataclass(frozen=True)
class Wording:
    """A description, the frame it was made from, and the phrases that fill it, gaps still open."""

    text: str
    frame: str
    phrases: tuple[str, ...]


def wordings(
    family: str, position: str, operation: str, labels: tuple[str, str] | None, form: str, part: Part, count: int,
    draw: random.Random,
) -> list[Wording]:  # fmt: skip
    """Descriptions of one cell.

    Args:
        labels: for true and false if the operation is a predicate; None for an open task, whose output looks as
            `form` says.
        part: which frames and phrases are used.
        count: at most so many; each has a frame of its own. The phrases of a level take turns.
        draw: decides which.
    """
    frames = (OPEN_FRAMES if labels is None else CHOICE_FRAMES).of[part]
    levels = {"list": LISTS, "item": POSITIONS[position]}
    if labels is None:
        levels |= {"result": RESULTS[operation], "act": ACTIONS[operation], "look": LOOKS[form]}
        levels |= {"finish": FINISHES[form]}
    else:
        levels |= {"claim": PREDICATES[operation], "rule": RULES}
    turns = {level: draw.sample(phrases.of[part], len(phrases.of[part])) for level, phrases in levels.items()}
    found = []
    for number, frame in enumerate(draw.sample(frames, min(count, len(frames)))):
        chosen = {level: phrases[number % len(phrases)] for level, phrases in turns.items()}
        found.append(_fill(frame, chosen, draw.choice(NOUNS[family]), labels))
    return found


def _fill(frame: str, chosen: Mapping[str, str], noun: tuple[str, str], labels: tuple[str, str] | None) -> Wording:
    singular, plural = noun
    item = chosen["item"].format(n=singular)
    gaps = {"list": chosen["list"].format(s=plural), "item": item}
    if labels is None:
        result = chosen["result"]
        if result.startswith("{x} ") and len(item.split()) >= LONG_ITEM:
            result = result.replace("{x}", "{x},", 1)
        gaps |= {"look": chosen["look"], "finish": chosen["finish"]}
        gaps |= {"result": result.format(x=item), "that_result": chosen["result"].format(x=f"that {singular}")}
        gaps |= {"action": chosen["act"].format(x=item), "act": chosen["act"].format(x="it")}
    else:
        gaps |= dict(zip("pq", labels, strict=True))
        gaps |= {"claim": chosen["claim"].format(x=item), "it_claims": chosen["claim"].format(x="it")}
        gaps |= {"rule": chosen["rule"].format(p=labels[0], q=labels[1])}
    used = {_LEVEL_OF.get(gap, gap) for _, gap, _, _ in Formatter().parse(frame) if gap}
    text = re.sub(r"(?:^|[.?] )[a-z]", lambda start: start[0].upper(), frame.format(**gaps))
    return Wording(text, frame, tuple(phrase for level, phrase in chosen.items() if level in used | {"item"}))
