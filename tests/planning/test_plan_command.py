"""`hl-scale plan`: what a user reads, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest

from hl_scale import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Directory of the run that is planned: one for all tests, so that its process is measured once."""
    return tmp_path_factory.mktemp("plan") / "run"


@pytest.fixture
def plan(tiny_config, write_yaml, run, tmp_path, monkeypatch, capsys):
    """plan(*arguments) -> exit status, stdout and stderr of `hl-scale plan` on the tiny run."""
    path = write_yaml(tiny_config(run, {"data.maximum_tokens": 16}), tmp_path / "config.yaml")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hl-scale", "plan", str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


def test_it_prints_components_phases_and_the_peak(plan, run):
    status, out, _ = plan("--world-size", "2")
    assert status == 0
    for word in ("packed base", "block constants", "Adam moments", "backward", "step", "peak per rank: ", "checkpoint"):
        assert word in out
    assert not run.exists()


def test_overrides_come_after_the_file(plan):
    _, out, _ = plan("--world-size", "2", "--json", "--gpu", "80GiB", "base.placement=zero3")
    cut = json.loads(out)
    _, out, _ = plan("--world-size", "2", "--json", "--gpu", "80GiB")
    whole = json.loads(out)
    assert whole["phases"]["step"]["packed base"] == 2 * cut["phases"]["step"]["packed base"]
    assert cut["peak_bytes"] == max(phase["sum"] for phase in cut["phases"].values())
    assert cut["device"] == "cuda" and cut["largest_micro_batch"] > 1


def test_ceilings_bound_the_step(plan):
    given = ("--world-size", "2", "--gpu", "80GiB", "--matmul", "620TFLOP/s", "--network", "50GB/s")
    _, out, _ = plan(*given, "--json")
    step = json.loads(out)["step"]
    assert step["compute_seconds"] == pytest.approx(step["flops"] / 620e12)
    assert step["wire_seconds"] == pytest.approx(json.loads(out)["wire"]["sent_bytes"]["sum"] / 50e9)
    assert step["overlapped_seconds"] == max(step["compute_seconds"], step["wire_seconds"])
    assert step["sequential_seconds"] == step["compute_seconds"] + step["wire_seconds"]
    assert step["tokens_per_second"][0] == pytest.approx(8 * 16 / step["overlapped_seconds"])
    _, out, _ = plan(*given)
    assert "lower bounds" in out and "tokens a second" in out and "gradients reduced" in out


def test_without_ceilings_a_gpu_gets_operations_and_bytes_alone(plan):
    _, out, _ = plan("--world-size", "2", "--gpu", "80GiB")
    assert "floating-point operations" in out and "lower bounds" not in out


def test_on_a_cpu_the_rate_of_products_is_measured(plan):
    _, out, _ = plan("--world-size", "2", "--json")
    step = json.loads(out)["step"]
    assert step["matmul_measured"] and step["compute_seconds"] > 0 and step["wire_seconds"] is None


def test_a_gpu_that_is_too_small_is_said_to_be(plan):
    status, out, _ = plan("--world-size", "2", "--gpu", "1GiB")
    assert status == 0 and "does NOT fit" in out and "base.placement=zero3" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--world-size", "2", "base.model=random:mistral-7"), "did you mean random:mistral-7b?"),
        (("--world-size", "2", "base.model=./nowhere"), "is not a directory"),
        (("--world-size", "2", "--gpu", "80 apples"), "write it as 80GiB"),
        (("--world-size", "2", "--matmul", "fast"), "write it as 620e12"),
        (("--world-size", "2", "--network", "50 apples"), "write it as 50GB/s"),
        (("--world-size", "2", "lora.target_modules=[query]"), "its linear layers are called"),
    ],
)
def test_mistakes_are_answered_with_a_fix(plan, arguments, expected):
    status, _, error = plan(*arguments)
    assert status == 2 and expected in error and "fix:" in error and "Traceback" not in error


def test_a_hub_model_without_a_network_is_refused_with_a_fix(plan, monkeypatch):
    import transformers

    def offline(*arguments, **options):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    status, _, error = plan("--world-size", "2", "base.model=mistralai/Mistral-7B-v0.1")
    assert status == 2 and "mistralai/Mistral-7B-v0.1" in error and "fix:" in error and "config.json" in error
