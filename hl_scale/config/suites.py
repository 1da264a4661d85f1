"""The suite `dialect-tasks`: which methods are measured on which labelled tasks, and how many seeds.

A suite names other recipes instead of repeating them: how the hypernetwork is trained (a run's recipe, or runs that are
trained already) and which labelled sets it is measured on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hl_scale.config.loading import read_sections
from hl_scale.config.section import Section

Method = Literal[
    "none", "own", "zero", "mean_named", "mean_training", "shuffled", "wrong",
    "lora", "prefix", "bottleneck", "tada", "hyper_adapter", "lora_dialect",
]  # fmt: skip
Experiment = Literal["main", "alignment", "annotations", "coverage", "leave_one_out", "ablations"]
Count = Annotated[int, Field(ge=1)]


class SuiteConfig(Section):
    recipe: str | None = None
    """Recipe of the hypernetwork. Its base, corpus, objective, steps and batch size are those of every method."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` changes of that recipe."""
    runs: tuple[str, ...] = ()
    """Instead of a recipe: directories of trained hypernetworks, one for each of `seeds`. Nothing of them is trained
    again, and baselines are trained with their settings."""
    labelled: tuple[str, ...] = Field(min_length=1)
    """Recipes of labelled sets (`hl-scale prepare-labelled`), with the settings of their task adapters."""
    labelled_overrides: tuple[str, ...] = ()
    """`section.key=value` changes of all of these."""
    dialects: tuple[str, ...] = ()
    """Varieties to measure; all that the labelled sets have unless given."""
    methods: tuple[Method, ...] = ("none", "own", "lora")
    """What is measured, see docs/evidence.md; `none` and `own` always are."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """Seeds of training: of the hypernetwork, of every baseline and of the task adapter."""
    budget: Count | None = None
    """Most parameters of an adapter as one dialect carries it; those of one generated LoRA unless given."""
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Peak learning rate of a baseline by the name of its method, where it is not the usual one."""
    dialect_steps: Count | None = None
    """Steps of the LoRAs of one dialect (`lora_dialect`, `aligned`, `annotated`); the recipe's unless given. They have
    a few hundred sentences at most, of which a recipe's steps are very many epochs."""
    bootstrap_samples: int = Field(default=4000, ge=100)
    """Resamples of test sentences (95% intervals)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resamples and of the shuffled vectors."""

    @model_validator(mode="after")
    def _one_origin(self) -> SuiteConfig:
        if (self.recipe is None) == (not self.runs):
            raise ValueError("give either recipe (the suite trains the hypernetworks) or runs (they are read)")
        if self.runs and len(self.runs) != len(self.seeds):
            raise ValueError(f"{len(self.runs)} runs for {len(self.seeds)} seeds: name one run for each seed")
        if self.runs and self.overrides:
            raise ValueError("overrides change a recipe; runs are taken as they are")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is named twice")
        return self


class AnnotationsConfig(Section):
    """How many sentences of a dialect is its feature vector worth?"""

    counts: tuple[Count, ...] = (10, 25, 50, 250, 500)
    """Sentences of the dialect that a LoRA is trained on."""
    kinds: tuple[Literal["aligned", "annotated"], ...] = ("aligned", "annotated")
    """`aligned`: by the alignment with their Standard English originals; `annotated`: by their labels."""
    dialects: tuple[str, ...] = ()
    """Those of the suite unless given."""


class CoverageConfig(Section):
    """Does a dialect gain more if training has seen more of its features?"""

    overrides: tuple[str, ...] = ()
    """Further changes of the recipe, for example training on a few named varieties."""
    varieties: Literal["all", "labelled"] = "all"
    """`all`: every variety of eWAVE, in labelled sets of their own beside the suite's (`DIRECTORY-all-varieties`);
    `labelled`: those that the suite's sets have."""
    labelled_overrides: tuple[str, ...] = ()
    """Further changes of the labelled sets, for example fewer sentences."""


class LeaveOneOutConfig(Section):
    """A hypernetwork for each dialect, trained on the others alone."""

    dialects: tuple[str, ...] = ()
    """Those of the suite unless given."""
    overrides: tuple[str, ...] = ()
    """Further changes of the recipe."""


class AblationsConfig(Section):
    variants: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name -> changes of the recipe; each is trained and measured as `own`."""
    one_hot: tuple[str, ...] = ()
    """Changes after which the recipe trains on named dialects. Two more hypernetworks are then trained on these:
    `named` with their features, and `one-hot` with a unit vector for each dialect, which tells nothing of others."""


class SuiteRecipe(Section):
    """A file of a suite."""

    suite: SuiteConfig
    annotations: AnnotationsConfig = AnnotationsConfig()
    coverage: CoverageConfig = CoverageConfig()
    leave_one_out: LeaveOneOutConfig = LeaveOneOutConfig()
    ablations: AblationsConfig = AblationsConfig()


def load_suite(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> SuiteRecipe:
    """Read a YAML file of a suite; see `load_config`. Environment variables are a run's and do not count here."""
    return read_sections(SuiteRecipe, path, overrides, environment={})
