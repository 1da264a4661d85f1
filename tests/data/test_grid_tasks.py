"""The grid: what is held out recombines what is seen, nothing but the description tells tasks apart, no test leaks."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace

import pytest

from hl_scale.data import grid, grid_phrases, grid_wordings
from hl_scale.data.grid import FAMILIES, FORMS, LABELS, Cell, cells, grid_tasks, nearest_seen_answers
from hl_scale.data.tasks import Task

TRAINING, TEST = 40, 24


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return grid_tasks(0, TRAINING, TEST)


def test_there_are_hundreds_of_cells_of_which_fifteen_percent_are_held_out() -> None:
    found = cells()
    assert len(found) == len({cell.name for cell in found}) == 486
    assert Counter(cell.answers for cell in found) == {"open": 366, "choice": 120}
    assert sum(not cell.seen for cell in found) / len(found) == pytest.approx(0.15, abs=0.005)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", cell.name) for cell in found)


@pytest.mark.parametrize("seed", range(4))
def test_every_level_and_pair_of_levels_of_a_held_out_cell_is_seen_in_its_family(seed: int) -> None:
    found = cells(seed)
    for cell in (cell for cell in found if not cell.seen):
        others = [other for other in found if other.seen and other.family == cell.family]
        others = [other for other in others if other.answers == cell.answers]
        for left, right in itertools.combinations(range(1, 4), 2):
            pair = (cell.levels[left], cell.levels[right])
            count = sum((other.levels[left], other.levels[right]) == pair for other in others)
            assert count >= (1 if cell.answers == "choice" else 2), (cell.name, pair)


def test_the_seed_decides_which_cells_are_held_out_and_which_inputs_and_words_are_used(tasks: list[Task]) -> None:
    assert grid_tasks(0, TRAINING, TEST) == tasks
    assert {cell.name for cell in cells(0) if not cell.seen} != {cell.name for cell in cells(1) if not cell.seen}
    other = grid_tasks(1, TRAINING, TEST)
    assert [task.name for task in other] == [task.name for task in tasks]
    assert other[0].train[0].input != tasks[0].train[0].input and other[0].descriptions != tasks[0].descriptions


@pytest.mark.parametrize(
    ("name", "items", "answer"),
    [
        ("words.last.upper.bare", "lamp, river, cold", "COLD"),
        ("words.third.capital.quoted", "lamp, river, cold, up", '"Cold"'),
        ("words.longest.initial.bracketed", "lamp, river, cold", "[r]"),
        ("words.shortest.length.exclaimed", "lamp, river, up", "2!"),
        ("words.second.final.prefixed", "lamp, river, up", "answer: r"),
        ("numbers.smallest.minus_one.bare", "31, 9, 1", "0"),
        ("numbers.largest.in_words.bare", "31, 9, 98", "ninety-eight"),
        ("numbers.first.in_words.bare", "30, 9, 98", "thirty"),
        ("numbers.second.in_words.bare", "30, 19, 98", "nineteen"),
        ("numbers.last.doubled.bare", "31, 9, 98", "196"),
        ("numbers.first.plus_one.bare", "99, 9, 98", "100"),
        ("kinds.name.twice.bare", "cat, hammer, Anna, red", "Anna Anna"),
        ("kinds.animal.copy.bare", "hammer, cat, Anna, red", "cat"),
        ("kinds.colour.upper.bare", "hammer, cat, Anna, red", "RED"),
        ("letters.earliest.previous.bare", "k, d, y", "c"),
        ("letters.latest.next.bare", "k, d, y", "z"),
        ("words.first.vowel_start.yes_no", "lamp, apple, up", "no"),
        ("words.second.has_e.true_false", "lamp, apple, up", "true"),
        ("words.last.long.1_0", "lamp, up, river", "1"),
        ("numbers.last.even.a_b", "31, 9, 98", "A"),
        ("numbers.first.above_50.a_b", "50, 9, 98", "B"),
        ("kinds.second.is_animal.yes_no", "hammer, cat, Anna, red", "yes"),
        ("kinds.last.is_person.yes_no", "hammer, cat, Anna, red", "no"),
        ("kinds.last.is_colour.yes_no", "hammer, cat, Anna, red", "yes"),
        ("letters.first.is_vowel.yes_no", "e, d, y", "yes"),
        ("letters.second.early.yes_no", "e, n, y", "no"),
    ],
)
def test_a_cell_answers_what_its_name_says(name: str, items: str, answer: str) -> None:
    assert Cell(*name.split(".")).answer(items.split(", ")) == answer


def test_open_tasks_of_a_family_read_the_same_inputs_and_no_test_input_or_permutation_is_trained_on(
    tasks: list[Task],
) -> None:
    trained: dict[str, set[frozenset[str]]] = {}
    tested: dict[str, set[frozenset[str]]] = {}
    for task in tasks:
        assert (len(task.train), len(task.test)) == (TRAINING, TEST)
        for part, found in ((task.train, trained), (task.test, tested)):
            assert len({example.input for example in part}) == len(part)
            found.setdefault(task.family, set()).update(frozenset(example.input.split(", ")) for example in part)
    assert trained.keys() == tested.keys() == {f"grid.{family}" for family in FAMILIES}
    assert all(not trained[family] & tested[family] for family in trained)
    for family in trained:
        inputs = {
            tuple(example.input for example in (*task.train, *task.test))
            for task in tasks
            if task.family == family and task.answers == "open"
        }
        assert len(inputs) == 1


def test_labels_of_choice_tasks_are_equally_frequent_in_training_and_test(tasks: list[Task]) -> None:
    for task in (task for task in tasks if task.answers == "choice"):
        for part in (task.train, task.test):
            counts = Counter(example.answer for example in part)
            assert set(counts.values()) == {len(part) // 2}, task.name
            assert set(counts) == set(LABELS[task.name.rsplit(".", 1)[1]])
            if part is task.train:
                assert len({example.answer for example in part[-13:]}) == 2, "the order tells the label"
    odd = grid_tasks(3, 7, 5)
    assert all(abs(2 * sum(e.answer == t.train[0].answer for e in t.train) - 7) == 1 for t in odd if "even" in t.name)


def test_no_two_cells_of_a_family_answer_alike_on_all_test_inputs(tasks: list[Task]) -> None:
    inputs = {task.family: [example.input.split(", ") for example in task.test] for task in tasks[::-1]}
    answers = Counter(
        (cell.family, *(cell.answer(items) for items in inputs[f"grid.{cell.family}"])) for cell in cells()
    )
    assert set(answers.values()) == {1}


def test_descriptions_are_many_and_all_different(tasks: list[Task]) -> None:
    for task in tasks:
        assert len(task.descriptions) >= 10 and len(task.heldout_descriptions) == 4
        assert all(len(text.split()) <= 50 for text in (*task.descriptions, *task.heldout_descriptions))
        assert all(
            not text[0].islower() and text[-1] == "." for text in (*task.descriptions, *task.heldout_descriptions)
        )
        assert not any(re.search(r"[{}|]|\.\.|  ", text) for text in (*task.descriptions, *task.heldout_descriptions))
    texts = [text for task in tasks for text in (*task.descriptions, *task.heldout_descriptions)]
    assert len(set(texts)) == len(texts)


def test_held_out_wordings_share_no_frame_and_no_phrase_with_any_trained_wording() -> None:
    frames: dict[str, set[str]] = {"trained": set(), "heldout": set()}
    phrases: dict[str, set[str]] = {"trained": set(), "heldout": set()}
    for seed, cell in itertools.product(range(2), cells()):
        for part in ("trained", "heldout"):
            wordings = cell.wordings(seed, part)
            assert len({wording.frame for wording in wordings}) == len(wordings)
            frames[part] |= {wording.frame for wording in wordings}
            phrases[part] |= {phrase for wording in wordings for phrase in wording.phrases}
    assert not frames["trained"] & frames["heldout"] and not phrases["trained"] & phrases["heldout"]
    assert len(frames["trained"]) == len(
        grid_wordings.OPEN_FRAMES.of["trained"] + grid_wordings.CHOICE_FRAMES.of["trained"]
    )


def test_every_level_has_six_phrases_to_train_on_and_two_held_out() -> None:
    tables = ("POSITIONS", "RESULTS", "ACTIONS", "LOOKS", "FINISHES", "PREDICATES")
    levels = [phrases for table in tables for phrases in getattr(grid_phrases, table).values()]
    for phrases in (*levels, grid_phrases.LISTS, grid_phrases.RULES):
        trained, heldout = phrases.of["trained"], phrases.of["heldout"]
        assert len(set(trained)) == len(trained) >= 6 and len(set(heldout)) == len(heldout) >= 2
        assert not any(phrase in other for phrase in heldout for other in trained)
    for frames in (grid_wordings.OPEN_FRAMES, grid_wordings.CHOICE_FRAMES):
        assert len(frames.of["trained"]) >= 14 and len(frames.of["heldout"]) >= 4
    levels_of = {level for family in FAMILIES.values() for level in (*family.positions, *family.judged_positions)}
    assert levels_of == grid_phrases.POSITIONS.keys() == grid.POSITIONS.keys()
    assert grid_phrases.RESULTS.keys() == grid_phrases.ACTIONS.keys() == grid.OPERATIONS.keys()
    assert grid_phrases.LOOKS.keys() == grid_phrases.FINISHES.keys() == FORMS.keys()
    assert grid_phrases.PREDICATES.keys() == grid.PREDICATES.keys()


def test_a_wrong_output_is_attributed_to_the_seen_task_it_answers(tasks: list[Task]) -> None:
    heldout = next(task for task in tasks if not task.seen and task.answers == "open")
    for example in heldout.test:
        answers = nearest_seen_answers(heldout, example, tasks)
        family = [task for task in tasks if task.seen and task.family == heldout.family]
        assert answers.keys() == {task.name for task in family}
        for task in family:
            if task.answers == "open":
                assert answers[task.name] == next(e.answer for e in task.test if e.input == example.input)
    shared = [sum(a == b for a, b in zip(name.split("."), heldout.name.split("."), strict=True)) for name in answers]
    assert shared == sorted(shared, reverse=True) and shared[0] == 4
    fewer = [replace(task, seen=False) if task.name == next(iter(answers)) else task for task in tasks]
    assert len(nearest_seen_answers(heldout, heldout.test[0], fewer)) == len(answers) - 1
    seen = family[0]
    assert seen.name not in nearest_seen_answers(seen, seen.test[0], tasks)


def test_more_examples_than_there_are_inputs_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"letters.*too few distinct inputs[^\n]*\n  fix: lower data.training_examples"
    ):
        grid._split_inputs("letters", 0, 5000, 24)
