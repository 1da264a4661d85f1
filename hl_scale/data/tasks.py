"""Tasks: descriptions in plain words, and examples of input and answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Example:
    input: str
    """Carries no instruction: the description is the only place where the task is told."""
    answer: str
    """One line, without leading space or terminator."""
    metadata: str = ""
    """JSON for checkers that need it."""


@dataclass(frozen=True)
class Task:
    name: str
    """[a-z0-9_.-]+, unique."""
    family: str
    """Tasks over the same inputs share it."""
    answers: Literal["open", "choice"]
    """`choice`: the answer is one of at most three labels."""
    descriptions: tuple[str, ...]
    """For training."""
    heldout_descriptions: tuple[str, ...]
    """Other wordings, for evaluation only."""
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    """Inputs disjoint from those of `train`."""
    seen: bool = True
    """False: held out entirely, never trained on."""
    checker: str = "exact"
    """`exact` (after stripping) or `reasoning_gym:<dataset name>`."""
    variety: str = ""
