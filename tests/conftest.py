"""A complete tiny setup: a random Gemma 3 with its tokenizer, a corpus on disk, configurations, launched processes."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from hl_scale.config import Config, parse_config

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_TIMEOUT = 600
"""Seconds until launched processes count as hanging; they take about 15 on a free machine."""
VARIETIES = ("Nigerian English", "Chicano English")
TEXT = (
    "the old man said that she was not sure whether this film is any good and they have been working here since last "
    "summer because nobody asked them to leave before it rained again on their garden"
)


def pytest_configure(config: pytest.Config) -> None:
    """One thread for tiny shapes: a second one mostly waits, spinning, and for very long beside other processes."""
    if "not slow" in config.option.markexpr:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


def pytest_collection_finish() -> None:
    """Modules live as long as the tests: the garbage collector need not look at them again."""
    gc.collect()
    gc.freeze()


def _sentences(count: int, seed: int) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [list(rng.choice(TEXT.split(), size=int(rng.integers(4, 15)))) for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random two-layer Gemma 3 (hidden 64, grouped queries) and a tokenizer trained on `TEXT`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model") / "tiny-gemma3"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<bos>", "<unk>"]
    tokenizer.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(directory)
    torch.manual_seed(7)
    config = Gemma3TextConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=16,
        pad_token_id=0, bos_token_id=1, initializer_range=0.15,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def write_tiny_corpus() -> Callable[..., Path]:
    """write_tiny_corpus(directory, edit) -> a corpus in the on-disk format.

    It has 48 training pairs, 12 of them identity pairs under the zero vector, and two held-out varieties of 8;
    `edit(rows)` may change the training rows first.
    """
    from hl_scale.conditions import typology
    from hl_scale.data.generation import SENTENCE_SCHEMA, pair_schema
    from hl_scale.data.shards import FORMAT_VERSION, ShardWriter, write_manifest

    def pair(number: int, sentence: int, variety: str, vector: np.ndarray, words: list[str], rng: Any) -> dict:
        dialect = list(words)
        if variety != "standard":
            dialect[int(rng.integers(len(words)))] = "been"
            dialect.insert(int(rng.integers(len(words))), "nobody")
        return {
            "pair_id": number, "sentence_id": sentence, "variety": variety, "vector": vector.tolist(),
            "standard": " ".join(words), "dialect": " ".join(dialect), "rules": [],
        }  # fmt: skip

    def write(directory: Path, edit: Callable[[list[dict]], None] = lambda rows: None) -> Path:
        rng = np.random.default_rng(3)
        train, heldout, table = [], [], []
        zeros = np.zeros(typology.NUM_FEATURES, np.float32)
        for sentence, words in enumerate(_sentences(20, seed=1)):
            split = "train" if sentence < 12 else "heldout"
            table.append(
                {"sentence_id": sentence, "split": split, "index": sentence, "source": 0, "text": " ".join(words)}
            )
            if split == "heldout":
                heldout += [pair(0, sentence, name, typology.vector(name), words, rng) for name in VARIETIES]
                continue
            for _ in range(3):
                vector = rng.choice([0.0, 0.3, 0.6, 1.0], size=zeros.size, p=[0.7, 0.1, 0.1, 0.1]).astype(np.float32)
                train.append(pair(len(train), sentence, "virtual", vector, words, rng))
            train.append(pair(len(train), sentence, "standard", zeros, words, rng))
        for row in heldout:
            row["pair_id"] = len(train) + heldout.index(row)
        edit(train)
        directory.mkdir(parents=True)
        shards: dict[str, Any] = {"failures": []}
        for name, schema, rows in (
            ("sentences", SENTENCE_SCHEMA, table), ("train", pair_schema(), train), ("heldout", pair_schema(), heldout),
        ):  # fmt: skip
            writer = ShardWriter(directory, name, schema, rows_per_shard=20)
            writer.add(pa.Table.from_pylist(rows, schema=schema))
            shards[name] = writer.close()
        write_manifest(
            directory,
            {
                "format_version": FORMAT_VERSION, "fingerprint": "c" * 64, "seed": 0, "shards": shards,
                "rows": {"planned": len(train) + len(heldout), "written": len(train) + len(heldout), "failed": 0},
                "evaluation_varieties": list(VARIETIES), "unavailable_rules": {},
            },
        )  # fmt: skip
        return directory

    return write


@pytest.fixture(scope="session")
def tiny_corpus(write_tiny_corpus: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides of `tiny_config` for a run on four tasks over the same word lists, one of them held out, with all that
    draws noise; the base itself encodes descriptions."""
    from hl_scale.config import TaskDataConfig
    from hl_scale.data.tasks import prepare_tasks

    directory = tmp_path_factory.mktemp("tasks")
    words = [" ".join(row[:3]) for row in _sentences(40, seed=5)]
    answers = {
        "first": lambda text: text.split()[0], "last": lambda text: text.split()[-1],
        "twice": lambda text: f"{text.split()[0]} {text.split()[0]}", "second": lambda text: text.split()[1],
    }  # fmt: skip
    rows = [
        {
            "name": name, "family": "words", "answers": "open", "seen": name != "second",
            "descriptions": [f"said the {name}", f"this is any {name} working here", f"asked them {name}"],
            "heldout_descriptions": [f"sure {name}"],
            "examples": [{"input": text, "answer": answer(text)} for text in words],
        }
        for name, answer in answers.items()
    ]  # fmt: skip
    (directory / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {
        "kind": "tasks", "directory": str(directory / "set"), "test_examples": 6, "examples_per_condition": 2,
        "sources": [{"kind": "jsonl", "path": str(directory / "tasks.jsonl")}], "answer_end": ".",
    }  # fmt: skip
    prepare_tasks(TaskDataConfig.model_validate(data))
    return {
        "data": data,
        "conditions": {"encoder": "base", "noise": 0.1},
        "objective": {
            "kind": "supervised", "label_smoothing": 0.1, "neftune_alpha": 5.0, "weight_penalty": 0.1,
            "unfamiliar_penalty": 0.2, "logit_tokens": 3,
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def tiny_config(tiny_model: Path, tiny_corpus: Path) -> Callable[..., Config]:
    """tiny_config(run_directory, {"section.key": value, ...}) -> a float32, NF4 run of 6 steps of 8 pairs.

    {"section": {...}} replaces a whole section.
    """

    def make(run_directory: Path, overrides: dict[str, Any] | None = None) -> Config:
        tree: dict[str, Any] = {
            "run": {"directory": str(run_directory)},
            "base": {"model": str(tiny_model), "compute_dtype": "float32"},
            "lora": {"rank": 4, "alpha": 4.0, "target_modules": ["q_proj", "v_proj"]},
            "data": {"directory": str(tiny_corpus), "sources": [{"kind": "text", "path": "unused.txt"}]},
            "hypernetwork": {"condition_width": 16, "slot_width": 8, "hidden_width": 32},
            "training": {
                "steps": 6, "global_batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-2, "loggers": [],
                "save_every": 2, "keep_checkpoints": 10,
            },
            # Below it a parameter stays whole on every rank, and the tiny base would not be partitioned.
            "zero3": {"parameter_persistence_threshold": 0},
            "cluster": {"num_workers": 2},
        }  # fmt: skip
        for key, value in (overrides or {}).items():
            section, _, name = key.partition(".")
            if name:
                tree.setdefault(section, {})[name] = value
            else:
                tree[section] = value
        return parse_config(tree)

    return make


@pytest.fixture(scope="session")
def write_yaml() -> Callable[[Config, Path], Path]:
    """write_yaml(config, path) -> path of the configuration as a file."""

    def write(config: Config, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def process_environment() -> dict[str, str]:
    """Of launched processes: CPU accelerator, one thread, and nothing a process group of this process left behind.

    There is no place to compile an operator to: training on CPUs must not need a compiler.
    """
    inherited = {key: value for key, value in os.environ.items() if key not in _RENDEZVOUS}
    return {
        **inherited, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": os.devnull,
    }  # fmt: skip


_RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session")
def deepspeed_command() -> Callable[..., list[str]]:
    """deepspeed_command(script, *arguments, ranks=2) -> the launcher's command line, on a free port."""

    def command(script: Path, *arguments: str, ranks: int = 2) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
        return [*launcher, "--master_port", str(port), str(script), *arguments]

    return command


@pytest.fixture(scope="session")
def launch(
    deepspeed_command: Callable[..., list[str]], process_environment: dict[str, str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """launch(script, *arguments, ranks=2) -> the finished process, with stdout and stderr as text."""

    def run(script: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
        process = subprocess.Popen(
            deepspeed_command(script, *arguments, ranks=ranks), cwd=ROOT, env=process_environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=LAUNCH_TIMEOUT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and its ranks
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def rank_server(process_environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "rank_server.py")], cwd=ROOT, env=process_environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    yield process
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def on_ranks(
    rank_server: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """on_ranks(script, *arguments, ranks=2, **environment) -> as `launch`, without a launcher and the ranks' imports.

    stdout and stderr are those of all ranks, one after the other.
    """

    def run(script: Path, *arguments: str, ranks: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
        output = tmp_path_factory.mktemp("ranks")
        request = {
            "script": str(script), "arguments": arguments, "ranks": ranks, "environment": environment,
            "output": str(output),
        }  # fmt: skip
        rank_server.stdin.write(json.dumps(request) + "\n")
        rank_server.stdin.flush()
        if not select.select([rank_server.stdout], [], [], LAUNCH_TIMEOUT)[0]:
            os.killpg(rank_server.pid, signal.SIGKILL)  # the server and its ranks
            raise TimeoutError(f"{script} still ran after {LAUNCH_TIMEOUT} s")
        status = int(rank_server.stdout.readline())
        said = ["".join(path.read_text() for path in sorted(output.glob(f"*.{kind}"))) for kind in ("out", "err")]
        return subprocess.CompletedProcess([str(script), *arguments], status, *said)

    return run


@pytest.fixture(scope="session")
def losses_of() -> Callable[[Path], list[float]]:
    """losses_of(run directory) -> the losses in metrics.jsonl, which must hold steps 1, 2, 3, ... once each."""

    def read(directory: Path) -> list[float]:
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]

    return read


@pytest.fixture(scope="session")
def deepspeed_run(
    tiny_config: Callable[..., Config],
    write_yaml: Callable[[Config, Path], Path],
    launch: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Run directory of 6 steps by `deepspeed launch/train.py` with two ranks."""
    directory = tmp_path_factory.mktemp("runs") / "deepspeed"
    config = write_yaml(tiny_config(directory), directory.with_suffix(".yaml"))
    done = launch(ROOT / "launch" / "train.py", "--config", str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done: step 6" in done.stdout
    return directory


@pytest.fixture(scope="module")
def single_process() -> Iterator[None]:
    """Lets tests call `train` in this process: the variables its process group sets are taken back afterwards.

    DeepSpeed calls the garbage collector several times in each training; modules need not be looked at each time.
    """
    import deepspeed  # noqa: F401
    from transformers import Gemma3ForCausalLM  # noqa: F401

    gc.collect()
    gc.freeze()
    before = dict(os.environ)
    yield
    for name in _RENDEZVOUS:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
