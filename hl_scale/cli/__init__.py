"""The `hl-scale` command. Errors a user can mend end with one screen of text and exit status 2."""

from __future__ import annotations

import logging
import os
import sys

import typer

from hl_scale.cli.adapters import check, compress, decompress, export, generate
from hl_scale.cli.data import features, prepare, prepare_labelled, varieties
from hl_scale.cli.machine import bench, doctor, plan
from hl_scale.cli.training import evaluate, library, report, schema, train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train hypernetworks that generate LoRA adapters for 4-bit language models.",
)
for command in (
    *(prepare, prepare_labelled, train, plan, doctor, evaluate, generate, check, export, compress, decompress),
    *(library, report, varieties, features, bench, schema),
):
    app.command()(command)


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
