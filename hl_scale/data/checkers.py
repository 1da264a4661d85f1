"""Whether an output answers an example: exact match, or the scorer of a reasoning-gym dataset."""

from __future__ import annotations

import functools
import json
from typing import Any

from hl_scale.data.tasks import Example, Task

_GYM = "reasoning_gym:"


class CheckerError(ValueError):
    """A checker is unknown or cannot run; the message says which and how to fix it."""


def check(task: Task, example: Example, output: str) -> bool:
    """Whether the first line of `output`, stripped, is right for `example` by the task's own checker.

    An output that starts with a line break has an empty answer. Partial credit of a reasoning-gym scorer is no credit.

    Raises:
        CheckerError: the checker is unknown, reasoning-gym is not installed, or the example lacks metadata.
    """
    answer = output.partition("\n")[0].strip()
    if task.checker == "exact":
        return answer == example.answer.strip()
    if not task.checker.startswith(_GYM):
        raise CheckerError(
            f"task {task.name}: unknown checker {task.checker!r}\n"
            "  fix: use 'exact' or 'reasoning_gym:<dataset name>', for example reasoning_gym:gcd"
        )
    dataset = gym_dataset(task.checker.removeprefix(_GYM))
    try:
        metadata = json.loads(example.metadata) if example.metadata else {}
        entry = {"question": example.input, "answer": example.answer, "metadata": metadata}
        return float(dataset.score_answer(answer=answer, entry=entry)) >= 1.0
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckerError(
            f"task {task.name}: the metadata of example {example.input!r} does not serve {task.checker}: {error!r}\n"
            "  fix: store the entry's metadata as JSON in the example, or use the checker 'exact'"
        ) from None


@functools.cache
def gym_dataset(name: str) -> Any:
    """A reasoning-gym dataset that serves for scoring; made once per name.

    Raises:
        CheckerError: reasoning-gym is not installed or has no such dataset.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise CheckerError(
            "reasoning-gym is not installed\n  fix: pip install reasoning-gym==0.1.25, which needs Python 3.11 or later"
        ) from None
    try:
        return reasoning_gym.create_dataset(name, size=1, seed=0)
    except ValueError as error:
        raise CheckerError(f"reasoning-gym: {error}\n  fix: name one of its datasets after '{_GYM}'") from None
