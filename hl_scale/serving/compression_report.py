"""What `hl-scale compress` says of its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hl_scale.data.library import Library
from hl_scale.serving.compression import CompressedAdapters
from hl_scale.serving.divergence import heldout_texts, measure_divergence

if TYPE_CHECKING:
    from hl_scale.engine.run import LoadedRun


def probe(
    run: LoadedRun, texts: Path | None, result: dict[str, Any]
) -> Callable[[Library, CompressedAdapters], Mapping[str, Any]]:
    """A measurement for `compress_adapters` on the lines of a file or on held-out texts; also put in `result`."""
    lines = heldout_texts(run) if texts is None else texts.read_text(encoding="utf-8").splitlines()
    sentences = [line for line in lines if line.strip()]

    def measure(library: Library, compressed: CompressedAdapters) -> Mapping[str, Any]:
        result.update(asdict(measure_divergence(run, library, compressed, sentences)))
        return result

    return measure


def render_compression(compressed: CompressedAdapters) -> Table:
    """A row per slot."""
    table = Table("slot", "columns", "error", "of differences", "iterations")
    for slot in compressed.slots:
        state = str(slot.iterations) if slot.converged else f"{slot.iterations}, not converged"
        errors = f"{slot.relative_error:.2e}", f"{slot.spread_error:.2e}"
        table.add_row(slot.slot.path, str(slot.columns), *errors, state)
    return table


def summary(compressed: CompressedAdapters, divergence: Mapping[str, Any]) -> list[str]:
    """Lines on the whole set; with divergence if it was measured."""
    worst = max(compressed.errors, key=lambda name: compressed.errors[name])
    before, after = compressed.bytes_before, compressed.bytes_after
    lines = [
        f"compressed: {compressed.directory} ({len(compressed.names)} adapters)",
        f"  relative error {compressed.relative_error:.2e}; of the differences between adapters "
        f"{compressed.spread_error:.2e}; worst adapter {compressed.errors[worst]:.2e} ({worst})",
        f"  {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after: {before / after:.1f} times smaller",
    ]
    if divergence:
        lines.append(
            f"  next-token divergence {divergence['restored']:.2e} nats (worst adapter {divergence['worst']:.2e}), "
            f"where the adapters move the base by {divergence['effect']:.2e}; same first token at "
            f"{divergence['top1_agreement']:.1%} of positions"
        )
    return lines
