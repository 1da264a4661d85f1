"""Tasks: descriptions in plain words, and examples of input and answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Example:
    """One input and its answer, a single line each way of reading it; `metadata` is JSON for checkers that need it."""

    input: str
    answer: str
    metadata: str = ""


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: unique; lower-case letters, digits, `_`, `.`, `-`.
        family: tasks over the same inputs share it.
        answers: `choice` if every answer is one of at most three labels, which a model may guess; else `open`.
        descriptions: wordings to train on.
        heldout_descriptions: other wordings, for evaluation only.
        train, test: examples; no input of `test` is one of `train`.
        seen: whether it is trained on.
        checker: what says whether an output is right, see `hl_scale.data.checkers`.
        variety: English variety of its answers, or "".
    """

    name: str
    family: str
    answers: Literal["open", "choice"]
    descriptions: tuple[str, ...]
    heldout_descriptions: tuple[str, ...]
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    seen: bool = True
    checker: str = "exact"
    variety: str = ""
