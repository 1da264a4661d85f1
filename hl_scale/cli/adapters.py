"""Commands that write adapters, or look at those that are there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hl_scale.cli.arguments import (
    CONDITION_HELP,
    Condition,
    Device,
    RunPath,
    Step,
    WithAdapter,
    open_run,
    read_added,
    require_choice,
)

_ENGINES = ("peft", "vllm", "sglang", "lorax", "llamacpp")


def generate(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="directory to write; of many adapters the folder of their directories")],
    condition: Annotated[str | None, typer.Option(help=CONDITION_HELP)] = None,
    all_dialects: Annotated[bool, typer.Option("--all-dialects", help="one for each variety of eWAVE")] = False,
    conditions: Annotated[
        Path | None, typer.Option(help='many: a file with a line {"name": ..., "condition": ...} for each')
    ] = None,
    profile: Annotated[
        str, typer.Option(help="plain, or portable: rank and scale that every engine accepts")
    ] = "plain",
    with_adapter: WithAdapter = None,
    step: Step = None,
    device: Device = None,
    force: Annotated[bool, typer.Option(help="replace adapters written earlier")] = False,
) -> None:
    """Write adapters as PEFT directories: of one condition, or of many (what is there already is kept).

    The base's weights are not needed.
    """
    from hl_scale.engine.run import load_generator
    from hl_scale.engine.zero3 import default_device
    from hl_scale.serving import batch, generate_adapter

    require_choice("--profile", profile, ("plain", "portable"))
    if [condition is not None, all_dialects, conditions is not None].count(True) != 1:
        raise ValueError("pass one of --condition, --all-dialects and --conditions")
    loaded = load_generator(run, step, device=device or default_device())
    chosen: Any = profile
    added = read_added(loaded, with_adapter)
    if condition is not None:
        written = generate_adapter(loaded, condition, out, profile=chosen, with_adapter=added, force=force)
        print(f"adapter: {written}")
        return
    parse = loaded.conditions.parse
    requests = batch.all_dialects(loaded) if conditions is None else batch.read_requests(conditions, parse)
    made = batch.generate_adapters(loaded, requests, out, profile=chosen, with_adapter=added, force=force)
    print(f"adapters: {made.directory} ({len(made.written)} written, {len(made.kept)} kept)")


def check(
    adapter: Annotated[Path, typer.Argument(help="PEFT directory, of whatever origin")],
    engines: Annotated[str, typer.Option(help="of peft, vllm, sglang, lorax and llamacpp")] = ",".join(_ENGINES),
    base: Annotated[str | None, typer.Option(help="name or directory of the base it must be for")] = None,
) -> None:
    """Is an adapter whole, and what do engines make of it? Needs none of them; status 1 if one would refuse it."""
    from hl_scale.data.validation import validate_adapter
    from hl_scale.serving.engines import check_engines

    names = engines.replace(" ", "").split(",")
    facts = validate_adapter(adapter, base_model_name_or_path=base)
    findings = list(check_engines(facts, names))
    print(f"{adapter}: whole and finite, {len(facts.slots)} layers, rank {facts.rank}, scale {facts.scale:g}")
    for name in names:
        own = [finding for finding in findings if finding.engine == name]
        verdict = "no" if any(finding.kind == "problem" for finding in own) else "yes"
        print(f"{name:9} {verdict}")
        for finding in own:
            print(f"          {finding.kind}: {finding.text}  [{finding.source}]")
    if any(finding.kind == "problem" for finding in findings):
        raise typer.Exit(1)


def export(
    run: RunPath,
    condition: Condition,
    out: Annotated[Path, typer.Option(help="directory to write, or file with --gguf")],
    merged: Annotated[bool, typer.Option("--merged", help="merge the adapter into the base, in 16 bits")] = False,
    merge_base: Annotated[
        str | None, typer.Option(help="with --merged: dequantized (the default), as trained, or the original weights")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="with --merged: bfloat16 (the default), float16 or float32")] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="write the adapter for llama.cpp")] = False,
    with_adapter: WithAdapter = None,
    step: Step = None,
    device: Device = None,
    force: Annotated[bool, typer.Option(help="replace what was written earlier")] = False,
) -> None:
    """Write a merged checkpoint that transformers loads without this package, or an adapter for llama.cpp."""
    if merged == gguf:
        raise ValueError("export takes one of --merged and --gguf (a PEFT directory is `hl-scale generate`)")
    if gguf:
        if merge_base is not None or dtype is not None:
            raise ValueError("--merge-base and --dtype go with --merged: a GGUF adapter holds float32 factors, no base")
        from hl_scale.serving.gguf_adapter import export_gguf

        loaded = open_run(run, step, device)
        added = read_added(loaded, with_adapter)
        print(f"adapter: {export_gguf(loaded, condition, out, with_adapter=added, force=force)}")
        return
    from hl_scale.serving import merge_adapter
    from hl_scale.serving.original import difference_table

    dtype, merge_base = dtype or "bfloat16", merge_base or "dequantized"
    require_choice("--dtype", dtype, ("bfloat16", "float16", "float32"))
    require_choice("--merge-base", merge_base, ("dequantized", "original"))
    loaded = open_run(run, step, device)
    added = read_added(loaded, with_adapter)
    chosen: Any = {"dtype": dtype, "merge_base": merge_base}
    written = merge_adapter(loaded, condition, out, **chosen, with_adapter=added, force=force)
    if written.differences:
        Console(width=None if sys.stdout.isatty() else 160).print(difference_table(written.differences))
    print(f"merged checkpoint: {written.directory}")
    print(f"  check against base and adapter unmerged: {written.check}")


def compress(
    adapters: Annotated[Path, typer.Argument(help="folder of PEFT directories of one rank, scale and base")],
    out: Annotated[Path, typer.Option(help="directory to write")],
    rank: Annotated[int, typer.Option(min=1, help="columns of the bases that the adapters share")] = 64,
    run: Annotated[Path | None, typer.Option(help="run on the same base: also compares next-token predictions")] = None,
    texts: Annotated[Path | None, typer.Option(help="with --run: sentences to compare on, one per line")] = None,
    device: Device = None,
    force: Annotated[bool, typer.Option(help="replace what was compressed earlier")] = False,
) -> None:
    """Replace a set of adapters by shared bases and a small core each; `decompress` gives single ones back."""
    from hl_scale.serving.compression import compress_adapters
    from hl_scale.serving.compression_report import probe, render_compression, summary

    if texts is not None and run is None:
        raise ValueError("--texts needs --run, whose base reads them")
    loaded = None if run is None else open_run(run, None, device)
    measured: dict[str, Any] = {}
    measure = None if loaded is None else probe(loaded, texts, measured)
    made = compress_adapters(adapters, out, rank, measure=measure, force=force)
    Console(width=None if sys.stdout.isatty() else 120).print(render_compression(made))
    print("\n".join(summary(made, measured)))


def decompress(
    compressed: Annotated[Path, typer.Argument(help="directory that `hl-scale compress` wrote")],
    name: Annotated[str, typer.Argument(help="of the adapter")],
    out: Annotated[Path, typer.Option(help="PEFT directory to write")],
    force: Annotated[bool, typer.Option(help="replace an adapter written earlier")] = False,
) -> None:
    """Write one adapter of a compressed set as a PEFT directory, of its old rank and scale."""
    from hl_scale.serving.compression import decompress_adapter, open_compressed

    print(f"adapter: {decompress_adapter(open_compressed(compressed), name, out, force=force)}")
