"""Commands on what a machine or a cluster can do: plans, checks and timings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hl_scale.cli.arguments import ConfigPath, Overrides
from hl_scale.config import load_config


def plan(
    config: ConfigPath,
    world_size: Annotated[int, typer.Option(min=1, help="ranks, one for each GPU")],
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="memory of one GPU, for example 80GiB: what fits?")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="of each text; data.maximum_tokens unless given")] = None,
    matmul: Annotated[str | None, typer.Option(help="operations a second of large products, e.g. 620e12")] = None,
    network: Annotated[str | None, typer.Option(help="bytes a second that a rank sends, for example 50GB/s")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="everything in bytes and seconds, as JSON")] = False,
) -> None:
    """Memory, traffic and time of a step for each rank before anything runs; needs config.json, no weights."""
    from hl_scale import planning
    from hl_scale.engine.zero3 import default_device

    capacity = None if gpu is None else planning.parse_size(gpu)
    device = default_device() if capacity is None else "cuda"
    rate = None if matmul is None else planning.parse_rate(matmul)
    bandwidth = None if network is None else planning.parse_rate(network, "bytes/s")
    loaded = load_config(config, overrides or ())
    if matmul is None and device == "cpu":
        rate = planning.measure_matmul()
    memory = planning.plan_memory(loaded, world_size, device=device, tokens=tokens, capacity=capacity)
    wire = planning.plan_wire(loaded, world_size, tokens=tokens)
    step = planning.plan_step(
        loaded, world_size, wire.total, tokens=tokens, matmul=rate, measured=matmul is None, network=bandwidth
    )
    if as_json:
        print(json.dumps(planning.as_dict(memory, wire, step), indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(planning.render_plan(memory))
    print("\n".join(planning.conclusions(memory)))
    if wire.total:
        console.print(planning.render_wire(wire))
    print("\n".join(planning.step_conclusions(step)))


def doctor(
    config: Annotated[Path | None, typer.Argument(help="also checks what this YAML configuration needs")] = None,
    overrides: Overrides = None,
    storage: Annotated[list[Path] | None, typer.Option(help="also checks this directory; may be repeated")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="also tries its hosts (lines HOST slots=N)")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="also looks from every node of RAY_ADDRESS")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="everything as JSON")] = False,
) -> None:
    """Is this machine, this cluster, able to run it, and how to mend what is not; status 1 if there is a problem."""
    from hl_scale.doctor import conclusion, examine, findings_as_dict, render_findings, worst

    loaded = None if config is None else load_config(config, overrides or ())
    found = []
    with Console(stderr=True).status("checking") as status:
        for finding in examine(loaded, storage=storage or (), hostfile=hostfile, cluster=cluster):
            found.append(finding)
            status.update(f"checking; done: {finding.check}")
    if as_json:
        print(json.dumps(findings_as_dict(found), indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(render_findings(found))
        print(conclusion(found))
    if worst(found) == "problem":
        raise typer.Exit(1)


def bench(
    what: Annotated[str, typer.Argument(help="sinkhorn, lora, step or t2l")],
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="of torch on the CPU")] = None,
    repeats: Annotated[int, typer.Option(help="timed calls of each computation")] = 5,
    long: Annotated[bool, typer.Option("--long", help="also rows that take minutes")] = False,
    recipe: Annotated[Path | None, typer.Option(help="step, t2l: whose step is timed")] = None,
) -> None:
    """Time a hot path against the peers that are installed; rows whose check fails are not timed."""
    from hl_scale.benchmark import run_benchmark

    if run_benchmark(what, device=device, threads=threads, repeats=repeats, long=long, recipe=recipe):
        raise typer.Exit(1)
