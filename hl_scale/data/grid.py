"""Hundreds of procedural tasks: the cells of a dense grid of input family x position x operation x output form.

All tasks of a family read the same inputs, so that nothing but the description tells which one is wanted. `open` cells
ask for something made from one item of the list; `choice` cells whether a predicate holds for it, by one of four pairs
of labels. The grid has holes, the held-out cells: every level of a hole, and every pair of its levels, is seen in
other cells of its family, so what a hole asks for is a recombination and never a new part.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hl_scale.data.grid_vocabulary import ANIMALS, COLOURS, NAMES, draw_items
from hl_scale.data.grid_wordings import Part, Wording, wordings
from hl_scale.data.tasks import Example, Task

HELDOUT_SHARE = 0.15
# An open cell exists for so many of the five forms of its position and operation: hundreds of cells, not a thousand.
FORMS_PER_PAIR = 3
TRAINED_WORDINGS, HELDOUT_WORDINGS = 14, 4
SEPARATOR = ", "

Items = Sequence[str]
POSITIONS: dict[str, Callable[[Items], str]] = {
    "first": lambda items: items[0],
    "second": lambda items: items[1],
    "third": lambda items: items[2],
    "last": lambda items: items[-1],
    "longest": lambda items: max(items, key=len),
    "shortest": lambda items: min(items, key=len),
    "smallest": lambda items: min(items, key=int),
    "largest": lambda items: max(items, key=int),
    "earliest": lambda items: min(items),
    "latest": lambda items: max(items),
    "name": lambda items: next(item for item in items if item in NAMES),
    "animal": lambda items: next(item for item in items if item in ANIMALS),
    "colour": lambda items: next(item for item in items if item in COLOURS),
}
OPERATIONS: dict[str, Callable[[str], str]] = {
    "copy": lambda item: item,
    "upper": str.upper,
    "capital": str.capitalize,
    "twice": lambda item: f"{item} {item}",
    "initial": lambda item: item[0],
    "final": lambda item: item[-1],
    "length": lambda item: str(len(item)),
    "plus_one": lambda item: str(int(item) + 1),
    "minus_one": lambda item: str(int(item) - 1),
    "doubled": lambda item: str(2 * int(item)),
    "in_words": lambda item: _in_words(int(item)),
    "next": lambda item: chr(ord(item) + 1),
    "previous": lambda item: chr(ord(item) - 1),
}
FORMS = {"bare": "{}", "quoted": '"{}"', "bracketed": "[{}]", "exclaimed": "{}!", "prefixed": "answer: {}"}
PREDICATES: dict[str, Callable[[str], bool]] = {
    "vowel_start": lambda item: item[0] in "aeiou",
    "long": lambda item: len(item) > 4,
    "has_e": lambda item: "e" in item,
    "even": lambda item: int(item) % 2 == 0,
    "above_50": lambda item: int(item) > 50,
    "is_person": lambda item: item in NAMES,
    "is_animal": lambda item: item in ANIMALS,
    "is_colour": lambda item: item in COLOURS,
    "is_vowel": lambda item: item in "aeiou",
    "early": lambda item: item < "n",
}
LABELS = {"yes_no": ("yes", "no"), "true_false": ("true", "false"), "1_0": ("1", "0"), "a_b": ("A", "B")}


@dataclass(frozen=True)
class Family:
    """Which positions, operations and predicates exist for one kind of input."""

    positions: tuple[str, ...]
    operations: tuple[str, ...]
    judged_positions: tuple[str, ...]
    predicates: tuple[str, ...]


FAMILIES = {
    "words": Family(
        ("first", "second", "third", "last", "longest", "shortest"),
        ("copy", "upper", "capital", "twice", "initial", "final", "length"),
        ("first", "second", "last"),
        ("vowel_start", "long", "has_e"),
    ),
    "numbers": Family(
        ("first", "second", "last", "smallest", "largest"),
        ("copy", "twice", "plus_one", "minus_one", "doubled", "in_words"),
        ("first", "second", "last"),
        ("even", "above_50"),
    ),
    "kinds": Family(
        ("first", "last", "name", "animal", "colour"),
        ("copy", "upper", "twice", "initial", "final"),
        ("first", "second", "last"),
        ("is_person", "is_animal", "is_colour"),
    ),
    "letters": Family(
        ("first", "second", "last", "earliest", "latest"),
        ("copy", "upper", "twice", "next", "previous"),
        ("first", "second", "last"),
        ("is_vowel", "early"),
    ),
}


@dataclass(frozen=True)
class Cell:
    """One task of the grid: a level of each factor. In a `choice` cell the operation is a predicate and the form a
    pair of labels."""

    family: str
    position: str
    operation: str
    form: str
    seen: bool = True

    @property
    def name(self) -> str:
        """What its task is called, for example `grid.words.last.upper.bare`."""
        return ".".join(("grid", *self.levels))

    @property
    def levels(self) -> tuple[str, str, str, str]:
        """Family, position, operation, form."""
        return (self.family, self.position, self.operation, self.form)

    @property
    def answers(self) -> Literal["open", "choice"]:
        """`choice` if the answer is one of two labels."""
        return "choice" if self.form in LABELS else "open"

    @property
    def pairs(self) -> tuple[tuple[str, ...], ...]:
        """Pairs of levels within the family, each level preceded by its factor's place."""
        placed = [f"{place}:{level}" for place, level in enumerate(self.levels)][1:]
        return tuple((self.family, self.answers, *pair) for pair in itertools.combinations(placed, 2))

    def answer(self, items: Items) -> str:
        """What is right for these items."""
        item = POSITIONS[self.position](items)
        if self.form in LABELS:
            return LABELS[self.form][0 if PREDICATES[self.operation](item) else 1]
        return FORMS[self.form].format(OPERATIONS[self.operation](item))

    def wordings(self, seed: int, part: Part) -> list[Wording]:
        """Its descriptions with the frame and phrases of each; the same for the same seed."""
        count = TRAINED_WORDINGS if part == "trained" else HELDOUT_WORDINGS
        draw = random.Random(f"{seed}/{self.name}/{part}")
        return wordings(*self.levels[:3], LABELS.get(self.form), self.form, part, count, draw)


def cells(seed: int = 0) -> list[Cell]:
    """All cells; the seed decides which about 15% of each family's open and choice cells are held out.

    Each pair of levels (position and operation, position and form, operation and form) stays in a seen cell of the
    same family, in two or more where the share can be had without touching the pairs that have few.
    """
    found = []
    for (family, _), group in itertools.groupby(_all_cells(), key=lambda cell: (cell.family, cell.answers)):
        members = list(group)
        candidates = random.Random(f"{seed}/{family}").sample(members, len(members))
        seen = Counter(pair for cell in members for pair in cell.pairs)
        heldout: set[Cell] = set()
        for kept in (2, 1):
            for cell in candidates:
                room = len(heldout) < round(HELDOUT_SHARE * len(members))
                if room and cell not in heldout and all(seen[pair] > kept for pair in cell.pairs):
                    heldout.add(cell)
                    seen.subtract(cell.pairs)
        found += [replace(cell, seen=cell not in heldout) for cell in members]
    return found


def grid_tasks(seed: int, training_examples: int, test_examples: int) -> list[Task]:
    """A task for each cell, in the order of `cells`.

    Each family's inputs are split into training and test before anything else; no set of items is on both sides. Open
    tasks read exactly the same inputs. A choice task takes, from the same side, the first inputs that make its labels
    equally frequent, one more of either at most.

    Raises:
        ValueError: a family has too few distinct inputs for so many examples.
    """
    inputs = {family: _split_inputs(family, seed, training_examples, test_examples) for family in FAMILIES}
    tasks = []
    for cell in cells(seed):
        train, test = (
            tuple(Example(SEPARATOR.join(items), cell.answer(items)) for items in _chosen(cell, pool, count, seed))
            for pool, count in zip(inputs[cell.family], (training_examples, test_examples), strict=True)
        )
        task = Task(
            name=cell.name,
            family=f"grid.{cell.family}",
            answers=cell.answers,
            descriptions=tuple(wording.text for wording in cell.wordings(seed, "trained")),
            heldout_descriptions=tuple(wording.text for wording in cell.wordings(seed, "heldout")),
            train=train,
            test=test,
            seen=cell.seen,
        )
        tasks.append(task)
    return tasks


def nearest_seen_answers(task: Task, example: Example, tasks: Iterable[Task]) -> dict[str, str]:
    """What the other seen tasks of the grid that read the same inputs answer to this one, so that an output can be
    attributed to the task it was copied from.

    Args:
        task: a task of the grid.
        example: one of its examples.
        tasks: those of the training, whatever their source.

    Returns:
        Answer by task name, the tasks that share most levels with `task` first.
    """
    levels, items = _cell(task).levels, example.input.split(SEPARATOR)
    others = [other for other in tasks if other.seen and other.family == task.family and other.name != task.name]
    others.sort(key=lambda other: -sum(a == b for a, b in zip(levels, _cell(other).levels, strict=True)))
    return {other.name: _cell(other).answer(items) for other in others}


def _cell(task: Task) -> Cell:
    _, family, position, operation, form = task.name.split(".")
    return Cell(family, position, operation, form)


def _all_cells() -> Iterable[Cell]:
    for name, family in FAMILIES.items():
        for (row, position), (column, operation) in itertools.product(
            enumerate(family.positions), enumerate(family.operations)
        ):
            for shift, form in enumerate(FORMS):
                # A Latin square of forms, so that every pair of levels has about equally many cells.
                if (row + column + shift) % len(FORMS) < FORMS_PER_PAIR:
                    yield Cell(name, position, operation, form)
        for levels in itertools.product(family.judged_positions, family.predicates, LABELS):
            yield Cell(name, *levels)


def _split_inputs(family: str, seed: int, training: int, test: int) -> tuple[list[Items], list[Items]]:
    """Training and test inputs, three times as many and more than asked for, so that labels can be balanced."""
    draw = random.Random(f"{seed}/{family}/inputs")
    sizes = [3 * count + 64 for count in (training, test)]
    found: dict[frozenset[str], Items] = {}
    for _ in range(4 * sum(sizes)):
        if len(found) == sum(sizes):
            break
        items = draw_items(family, draw)
        found.setdefault(frozenset(items), items)
    else:
        raise ValueError(
            f"the grid's family {family!r} has too few distinct inputs for {training} training and {test} test "
            "examples per task\n  fix: lower data.training_examples or data.test_examples"
        )
    inputs = list(found.values())
    return inputs[sizes[1] :], inputs[: sizes[1]]


def _chosen(cell: Cell, pool: Sequence[Items], count: int, seed: int) -> list[Items]:
    if cell.answers == "open":
        return list(pool[:count])
    room = dict(zip(LABELS[cell.form], (count - count // 2, count // 2), strict=True))
    chosen = []
    for items in pool:
        label = cell.answer(items)
        if room[label]:
            room[label] -= 1
            chosen.append(items)
    assert len(chosen) == count, f"{cell.name}: a label is too rare among {len(pool)} inputs"
    # The rarer label is over-represented at the end; the order must not tell.
    random.Random(f"{seed}/{cell.name}/order").shuffle(chosen)
    return chosen


_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def _in_words(number: int) -> str:
    """English name of a number from 0 to 99."""
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
