"""Commands on what is trained on: corpora, task sets, labelled sets, dialects and their features."""

from __future__ import annotations

from typing import Annotated

import typer

from hl_scale.cli.arguments import ConfigPath, Overrides
from hl_scale.config import load_config


def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option(help="build anew even if a matching corpus exists")] = False,
) -> None:
    """Build the parallel corpus or the task set of a configuration: Parquet shards and a manifest."""
    data = load_config(config, overrides or ()).data
    if data.kind == "tasks":
        from hl_scale.data.tasks import prepare_tasks

        made = prepare_tasks(data, force=force)
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in made.tasks.manifest["counts"].items())
        print(f"task set {'up to date' if made.reused else 'written'}: {made.tasks.directory} ({counts})")
        return
    from hl_scale.data.corpus import prepare_corpus

    prepared = prepare_corpus(data, force=force)
    rows = prepared.manifest["rows"]
    state = "up to date" if prepared.reused else "written"
    print(f"corpus {state}: {prepared.directory} ({rows['written']} pairs, {rows['failed']} rows failed)")
    for rule, reason in prepared.manifest["unavailable_rules"].items():
        print(f"  rule {rule} cannot fire here: {reason}")


def prepare_labelled(
    config: ConfigPath,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option(help="build anew even if a matching set exists")] = False,
) -> None:
    """Build a labelled set and its dialect forms (a file with the section `labelled`): Parquet and a manifest."""
    from hl_scale.config import load_labelled_config
    from hl_scale.data.labelled_preparation import prepare_labelled as prepare_set

    prepared = prepare_set(load_labelled_config(config, overrides or ()).labelled, force=force)
    manifest = prepared.labelled.manifest
    sizes = ", ".join(f"{facts['examples']} {split}" for split, facts in manifest["splits"].items())
    print(f"labelled set {'up to date' if prepared.reused else 'written'}: {prepared.labelled.directory} ({sizes})")
    for name, entry in manifest["varieties"].items():
        changed = f"{entry['test']['changed_share']:.1%} of test examples changed"
        print(f"  {name}: {changed}, {entry['test']['failed'] + entry['train']['failed']} failed")
    for rule, reason in manifest["unavailable_rules"].items():
        print(f"  rule {rule} cannot fire here: {reason}")


def varieties() -> None:
    """List the varieties of English that have a feature vector."""
    from hl_scale.conditions import typology

    for name in typology.varieties():
        print(f"{int((typology.vector(name) > 0).sum()):4d} features  {name}")


def features() -> None:
    """List the eWAVE features: number, name, and whether Multi-VALUE has a rule for it."""
    from hl_scale.conditions import typology

    for number, (name, rule) in enumerate(
        zip(typology.feature_names(), typology.implementable_features(), strict=True), start=1
    ):
        print(f"{number:3d}  {'rule   ' if rule else 'no rule'}  {name}")
