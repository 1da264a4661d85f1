"""The builtin tasks: complete, disjoint, balanced, deterministic, and right by their own checkers."""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest

from hl_scale.data.builtin import builtin_tasks, puzzles
from hl_scale.data.builtin.family import BuiltinTaskError, balanced
from hl_scale.data.builtin.words import draw_nouns, nouns, plural
from hl_scale.data.checkers import CheckerError, check, gym_dataset
from hl_scale.data.sentences import read_scored_vader
from hl_scale.data.tasks import Example, Task

pytest.importorskip("reasoning_gym")
TRAINING, TEST = 256, 24


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return builtin_tasks(0, TRAINING, TEST)


def by_name(tasks: list[Task]) -> dict[str, Task]:
    return {task.name: task for task in tasks}


def test_there_are_enough_tasks_and_some_are_set_apart(tasks: list[Task]) -> None:
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names) >= 44
    assert all(re.fullmatch(r"[a-z0-9_.-]+", name) for name in names)
    assert {task.name for task in tasks if not task.seen} == {
        "sentence.positive_negative", "sentence.film_one_zero", "words.upper_last", "words.drop_last",
        "word.spelled_upper", "word.plural_upper", "numbers.smaller_units", "numbers.second_plus_one",
    }  # fmt: skip
    assert sum(task.checker.startswith("reasoning_gym:") for task in tasks) >= 8


def test_every_task_has_the_examples_asked_for(tasks: list[Task]) -> None:
    assert {(len(task.train), len(task.test)) for task in tasks} == {(TRAINING, TEST)}


def test_every_task_has_many_wordings_and_none_is_used_twice(tasks: list[Task]) -> None:
    for task in tasks:
        assert len(task.descriptions) >= 6 and len(task.heldout_descriptions) >= 2, task.name
    wordings = [text.strip().lower() for task in tasks for text in (*task.descriptions, *task.heldout_descriptions)]
    assert [text for text, count in Counter(wordings).items() if count > 1] == []


def test_no_wording_is_a_template_of_another_task(tasks: list[Task]) -> None:
    """Tasks of opposite roles do not share the rest of their sentences word for word: no six words in a row come in
    the wordings of more than four tasks."""
    users: dict[tuple[str, ...], set[str]] = {}
    for task in tasks:
        for text in (*task.descriptions, *task.heldout_descriptions):
            words = re.findall(r"\w+", text.lower())
            for start in range(len(words) - 5):
                users.setdefault(tuple(words[start : start + 6]), set()).add(task.name)
    assert {" ".join(words): names for words, names in users.items() if len(names) > 4} == {}


def test_a_choice_names_its_labels_in_every_wording(tasks: list[Task]) -> None:
    for task in tasks:
        labels = {example.answer for example in task.train}
        if task.answers == "choice" and task.name != "words.count":  # a number needs no list of labels
            for text in (*task.descriptions, *task.heldout_descriptions):
                spoken = text.lower().replace("zero", "0").replace("one", "1")
                assert all(label.lower() in spoken for label in labels), (task.name, text)


def test_test_inputs_are_never_training_inputs_of_the_family(tasks: list[Task]) -> None:
    train: dict[str, set[str]] = {}
    for task in tasks:
        train.setdefault(task.family, set()).update(example.input for example in task.train)
    for task in tasks:
        assert not train[task.family] & {example.input for example in task.test}, task.name
        assert len({example.input for example in (*task.train, *task.test)}) == TRAINING + TEST, task.name


def test_most_tasks_share_their_inputs_word_for_word_with_others(tasks: list[Task]) -> None:
    shared = Counter(tuple(example.input for example in (*task.train, *task.test)) for task in tasks)
    assert sum(count for count in shared.values() if count > 1) >= len(tasks) / 2


def test_inputs_and_answers_are_short_single_lines(tasks: list[Task]) -> None:
    for task in tasks:
        for example in (*task.train, *task.test):
            assert 0 < len(example.input.split()) <= 12 and len(example.input) <= 110, (task.name, example)
            assert 0 < len(example.answer.split()) <= 13 and len(example.answer) <= 40, (task.name, example)
            assert "\n" not in example.input + example.answer and example.answer == example.answer.strip()


def test_choices_have_few_labels_and_they_are_balanced(tasks: list[Task]) -> None:
    for task in tasks:
        for examples, most in ((task.train, 0.55), (task.test, 0.7)):
            counts = Counter(example.answer for example in examples)
            if task.answers == "choice":
                assert len(counts) <= 3, (task.name, counts)
                assert max(counts.values()) <= most * len(examples), (task.name, counts)
            elif examples is task.train:
                assert len(counts) > 3, (task.name, counts)


def test_open_answers_are_not_guessed_by_the_most_frequent_one(tasks: list[Task]) -> None:
    for task in tasks:
        if task.answers == "open":
            (_, most), *_ = Counter(example.answer for example in task.train).most_common(1)
            assert most <= 0.55 * len(task.train), task.name


def test_the_same_seed_gives_the_same_tasks_whatever_the_global_generator(tasks: list[Task]) -> None:
    random.seed(5)
    again = builtin_tasks(0, TRAINING, TEST)
    assert again == tasks
    other = builtin_tasks(1, TRAINING, TEST)
    assert [task.name for task in other] == [task.name for task in tasks]
    assert all(a.train != b.train for a, b in zip(other, tasks, strict=True))


def test_every_example_passes_its_own_checker_and_a_wrong_answer_does_not(tasks: list[Task]) -> None:
    for task in tasks:
        for example in (*task.train[:40], *task.test):
            assert check(task, example, f" {example.answer}\nand more"), (task.name, example)
            assert not check(task, example, " @"), (task.name, example)
            assert not check(task, example, f"\n{example.answer}"), (task.name, example)


def test_answers_are_those_of_the_task(tasks: list[Task]) -> None:
    named = by_name(tasks)
    for name, expected in {
        "words.upper_last": lambda words: words.split()[-1].upper(),
        "words.drop_first": lambda words: words.partition(" ")[2],
        "words.first_twice": lambda words: " ".join(words.split()[:1] * 2),
        "words.initials": lambda words: " ".join(word[0] for word in words.split()),
        "numbers.sum": lambda pair: str(eval(pair.replace(" ", "+"))),
        "numbers.sign": lambda pair: "<" if eval(pair.replace(" ", "<")) else ">",
        "numbers.smaller_units": lambda pair: sorted(pair.split())[0][-1],
        "word.spelled": " ".join,
        "puzzle.chain_sum": lambda text: str(eval(text)),
        "puzzle.spell_backward": lambda word: word[::-1],
    }.items():
        for example in named[name].train:
            assert example.answer == expected(example.input), (name, example)


def test_sentences_carry_the_sign_of_their_human_rating(tasks: list[Task]) -> None:
    scores = {
        " ".join(text.split()).lower().rstrip(".!?"): score
        for source in ("movie", "news", "product")
        for score, text in read_scored_vader(source)
    }
    task = by_name(tasks)["sentence.positive_negative"]
    assert all((scores[example.input] > 0) == (example.answer == "positive") for example in task.train)


def test_nouns_are_listed_once_and_have_a_plural() -> None:
    texts = [noun.text for noun in nouns()]
    assert all(set(text) & set("aeiou") for text in texts)  # word.vowels
    assert len(set(texts)) == len(texts) and all(re.fullmatch(r"[a-z]{3,8}", text) for text in texts)
    forms = {"box": "boxes", "cherry": "cherries", "toy": "toys", "church": "churches", "cat": "cats"}
    assert {word: plural(word) for word in forms} == forms


def test_nouns_are_drawn_in_equal_parts_living_or_not_with_e_or_without() -> None:
    drawn = Counter((noun.living, "e" in noun.text) for noun in draw_nouns(random.Random(0), 100))
    assert list(drawn.values()) == [25] * 4


def test_balanced_prefixes_keep_the_weights() -> None:
    dealt = balanced([(["a"] * 9, 2), (["b"] * 9, 1)], random.Random(0))
    assert len(dealt) == 12
    assert all(Counter(dealt[:length]) == {"a": length // 3 * 2, "b": length // 3} for length in (3, 6, 9, 12))
    assert dealt != ["a", "a", "b"] * 4


def test_too_few_inputs_for_the_test_examples_are_refused() -> None:
    with pytest.raises(BuiltinTaskError, match=r"'word': 500 test examples leave none.*\n  fix: lower"):
        builtin_tasks(0, 10, 500)


def test_puzzles_without_reasoning_gym_say_how_to_get_it(tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(BuiltinTaskError, match=r"need reasoning-gym\n  fix: pip install reasoning-gym"):
        puzzles.FAMILIES[0].draw(random.Random(0), 5)
    gym_dataset.cache_clear()
    task = by_name(tasks)["puzzle.gcd"]
    with pytest.raises(CheckerError, match=r"not installed\n  fix: pip install reasoning-gym"):
        check(task, task.test[0], "1")


def test_checkers_say_what_is_wrong_with_them(tasks: list[Task]) -> None:
    task = by_name(tasks)["puzzle.fraction_simplification"]
    with pytest.raises(CheckerError, match="unknown checker 'fuzzy'"):
        check(replace(task, checker="fuzzy"), task.test[0], "1")
    with pytest.raises(CheckerError, match=r"reasoning-gym: .*nothing_of_the_kind"):
        check(replace(task, checker="reasoning_gym:nothing_of_the_kind"), task.test[0], "1")
    leg = by_name(tasks)["puzzle.word_sorting"]
    with pytest.raises(CheckerError, match="does not serve"):
        check(leg, Example("b, a", "a, b"), "a, b")
