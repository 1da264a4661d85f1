"""The `hl-scale` command. Errors a user can mend end with one screen of text and exit status 2."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hl_scale.config import Config, load_config

if TYPE_CHECKING:
    from hl_scale.base import AdaptedModel, TaskAdapter
    from hl_scale.engine.run import LoadedRun

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train hypernetworks that generate LoRA adapters for 4-bit language models.",
)

ConfigPath = Annotated[Path, typer.Argument(help="YAML configuration, for example one of configs/")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, read after the file")]
RunPath = Annotated[Path, typer.Argument(help="run directory of a training")]
CONDITION_HELP = (
    '"dialect:NAME", "standard" or "features:FILE.json" ({feature: 0..1}); "task:NAME" or "description:WORDS"'
)
Condition = Annotated[str, typer.Option("--condition", help=CONDITION_HELP)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU unless there is none")]
_ENGINES = ("peft", "vllm", "sglang", "lorax", "llamacpp")
WithAdapter = Annotated[Path | None, typer.Option(help="PEFT directory of a trained LoRA on the same base, to add")]
Step = Annotated[int | None, typer.Option(help="checkpoint step; the newest unless given")]


@app.command()
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


@app.command()
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


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train in this process alone; for several use `deepspeed launch/train.py` or `launch/ray_train.py`."""
    from hl_scale.engine.loop import train as run_training

    result = run_training(load_config(config, overrides or ()))
    state = "interrupted" if result.interrupted else "done"
    print(f"{state}: step {result.step}, loss {result.loss:.4f}, {result.checkpoint}")
    if result.interrupted:
        raise typer.Exit(130)


@app.command()
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


@app.command()
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


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run directory of a training; with --suite the suite's recipe")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="--suite: section.key=value, read after the recipe")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="dialect-tasks: labelled tasks, against baselines")] = None,
    experiment: Annotated[
        str | None, typer.Option(help="--suite: main, annotations, coverage, leave_one_out or ablations")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="--suite: folder of its cells and reports")] = None,
    control: Annotated[Path | None, typer.Option(help="run of kind plain_lora with the same budget")] = None,
    prompted: Annotated[
        Path | None, typer.Option(help="tasks: run of kind plain_lora with data.description_in_prompt")
    ] = None,
    library: Annotated[Path | None, typer.Option(help="tasks: folder with a PEFT LoRA for each task")] = None,
    tasks: Annotated[str | None, typer.Option(help="tasks: names or globs, for example 'words.*,number.*'")] = None,
    arms: Annotated[str | None, typer.Option(help="tasks: which to run, for example own,other,base")] = None,
    examples: Annotated[int | None, typer.Option(min=1, help="tasks: test examples per task; all unless given")] = None,
    sentences: Annotated[int | None, typer.Option(help="dialects: held-out sentences; all unless given")] = None,
    step: Step = None,
    device: Device = None,
) -> None:
    """Measure a run against its controls, with intervals; writes evaluation.json, evaluation.md and report.html.

    With --suite a whole suite: whatever is missing is trained, and what is there is read.
    """
    if suite is not None:
        others = (control, prompted, library, tasks, arms, examples, sentences, step)
        if any(option is not None for option in others):
            raise ValueError("with --suite only --experiment, --out and --device apply: the rest is in its recipe")
        _evaluate_suite(suite, run, overrides or (), out, experiment or "main", device)
        return
    if overrides or experiment or out:
        raise ValueError("section.key=value, --experiment and --out go with --suite")
    from hl_scale.evaluation import evaluate_run
    from hl_scale.evaluation.command import Request

    loaded = _load(run, step, device)
    named, chosen = (None if text is None else text.replace(" ", "").split(",") for text in (tasks, arms))
    request = Request(control, prompted, library, named, chosen, examples, sentences)
    done = evaluate_run(loaded, request, lambda directory: _load(directory, None, device, loaded.base))
    # A table is wider than a pipe's 80 columns.
    Console(width=None if sys.stdout.isatty() else 200).print(done.table)
    print(f"saved: {run / 'evaluation.json'}, {run / 'evaluation.md'}")
    print(f"report: {done.report}")


@app.command()
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

    _choose("--profile", profile, ("plain", "portable"))
    if with_adapter is not None and condition is None:
        raise ValueError("--with-adapter goes with --condition: it is added to one adapter at a time")
    if [condition is not None, all_dialects, conditions is not None].count(True) != 1:
        raise ValueError("pass one of --condition, --all-dialects and --conditions")
    loaded = load_generator(run, step, device=device or default_device())
    chosen: Any = profile
    if condition is not None:
        added = _task_adapter(loaded, with_adapter)
        written = generate_adapter(loaded, condition, out, profile=chosen, with_adapter=added, force=force)
        print(f"adapter: {written}")
        return
    parse = loaded.conditions.parse
    requests = batch.all_dialects(loaded) if conditions is None else batch.read_requests(conditions, parse)
    made = batch.generate_adapters(loaded, requests, out, profile=chosen, force=force)
    print(f"adapters: {made.directory} ({len(made.written)} written, {len(made.kept)} kept)")


@app.command()
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


@app.command()
def export(
    run: RunPath,
    condition: Condition,
    out: Annotated[Path, typer.Option(help="directory to write, or file with --gguf")],
    merged: Annotated[bool, typer.Option("--merged", help="merge the adapter into the base, in 16 bits")] = False,
    merge_base: Annotated[str, typer.Option(help="dequantized, as trained, or the original weights")] = "dequantized",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
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
        from hl_scale.serving.gguf_adapter import export_gguf

        loaded = _load(run, step, device)
        added = _task_adapter(loaded, with_adapter)
        print(f"adapter: {export_gguf(loaded, condition, out, with_adapter=added, force=force)}")
        return
    from hl_scale.serving import merge_adapter
    from hl_scale.serving.original import difference_table

    _choose("--dtype", dtype, ("bfloat16", "float16", "float32"))
    _choose("--merge-base", merge_base, ("dequantized", "original"))
    loaded = _load(run, step, device)
    added = _task_adapter(loaded, with_adapter)
    chosen: Any = {"dtype": dtype, "merge_base": merge_base}
    written = merge_adapter(loaded, condition, out, **chosen, with_adapter=added, force=force)
    if written.differences:
        Console(width=None if sys.stdout.isatty() else 160).print(difference_table(written.differences))
    print(f"merged checkpoint: {written.directory}")
    print(f"  check against base and adapter unmerged: {written.check}")


@app.command()
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
    loaded = None if run is None else _load(run, None, device)
    measured: dict[str, Any] = {}
    measure = None if loaded is None else probe(loaded, texts, measured)
    made = compress_adapters(adapters, out, rank, measure=measure, force=force)
    Console(width=None if sys.stdout.isatty() else 120).print(render_compression(made))
    print("\n".join(summary(made, measured)))


@app.command()
def decompress(
    compressed: Annotated[Path, typer.Argument(help="directory that `hl-scale compress` wrote")],
    name: Annotated[str, typer.Argument(help="of the adapter")],
    out: Annotated[Path, typer.Option(help="PEFT directory to write")],
    force: Annotated[bool, typer.Option(help="replace an adapter written earlier")] = False,
) -> None:
    """Write one adapter of a compressed set as a PEFT directory, of its old rank and scale."""
    from hl_scale.serving.compression import decompress_adapter, open_compressed

    print(f"adapter: {decompress_adapter(open_compressed(compressed), name, out, force=force)}")


@app.command()
def library(
    config: ConfigPath,
    out: Annotated[Path, typer.Option(help="directory of the library")],
    overrides: Overrides = None,
    tasks: Annotated[list[str] | None, typer.Option(help="name or glob; may be repeated; all unless given")] = None,
    keep_runs: Annotated[bool, typer.Option("--keep-runs", help="keep run directories, in OUT/.runs")] = False,
) -> None:
    """Train one LoRA for each task of a prepared set, side by side on Ray; status 1 if a task failed."""
    from hl_scale.cluster.library import train_library

    made = train_library(load_config(config, overrides or ()), out, tasks or (), keep_runs=keep_runs)
    for name, error in made.failed.items():
        print(f"failed: {name}: {error}", file=sys.stderr)
    print(f"library: {made.directory} ({len(made.trained)} trained, {len(made.kept)} kept, {len(made.failed)} failed)")
    if made.interrupted:
        print("interrupted: run the same command to go on")
        raise typer.Exit(130)
    if made.failed:
        raise typer.Exit(1)


@app.command()
def report(run: RunPath) -> None:
    """Write report.html again from metrics.jsonl and evaluation.json."""
    from hl_scale.evaluation import write_report

    print(f"report: {write_report(run)}")


@app.command()
def varieties() -> None:
    """List the varieties of English that have a feature vector."""
    from hl_scale.conditions import typology

    for name in typology.varieties():
        print(f"{int((typology.vector(name) > 0).sum()):4d} features  {name}")


@app.command()
def features() -> None:
    """List the eWAVE features: number, name, and whether Multi-VALUE has a rule for it."""
    from hl_scale.conditions import typology

    for number, (name, rule) in enumerate(
        zip(typology.feature_names(), typology.implementable_features(), strict=True), start=1
    ):
        print(f"{number:3d}  {'rule   ' if rule else 'no rule'}  {name}")


@app.command()
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


@app.command()
def schema() -> None:
    """Print the JSON schema of a configuration, with the help text of every key."""
    print(json.dumps(Config.model_json_schema(), indent=1))


def _choose(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{option} {value} is not one of {', '.join(choices)}")


def _load(directory: Path, step: int | None, device: str | None, base: AdaptedModel | None = None) -> LoadedRun:
    from hl_scale.engine.run import load_run
    from hl_scale.engine.zero3 import default_device

    return load_run(directory, step, base, device or default_device())


def _evaluate_suite(
    suite: str, recipe: Path, overrides: Sequence[str], out: Path | None, experiment: str, device: str | None
) -> None:
    _choose("--suite", suite, ("dialect-tasks",))
    if out is None:
        raise ValueError("--suite needs --out, the folder of its cells and reports")
    from hl_scale.config import load_suite
    from hl_scale.engine.zero3 import default_device
    from hl_scale.evaluation.dialect_tasks import run_suite
    from hl_scale.evaluation.dialect_tasks.tables import lines

    done = run_suite(load_suite(recipe, overrides), out, experiment, device or default_device())
    for line in lines(done.result):
        print(line)
    print(f"cells: {done.made} made, {done.read} read, in {out / 'cells'}")
    print(f"tables: {done.directory / 'tables.md'}, report: {done.report}")


def _task_adapter(run: LoadedRun, directory: Path | None) -> TaskAdapter | None:
    from hl_scale.base import read_task_adapter

    return None if directory is None else read_task_adapter(directory, run.base, run.config.base)


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
