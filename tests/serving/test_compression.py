"""Compressed sets: what comes back is what was promised, within the reported error, or it is refused."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hl_scale import cli
from hl_scale.conditions import typology
from hl_scale.config import LoraConfig
from hl_scale.data.library import Library, LibraryError
from hl_scale.lora import LoraFactors
from hl_scale.serving import ExportError, OutputError
from hl_scale.serving.batch import Request, generate_adapters
from hl_scale.serving.compression import (
    CompressionError,
    compress_adapters,
    decompress_adapter,
    open_compressed,
)
from hl_scale.serving.divergence import measure_divergence

COUNT = 6
TEXTS = ["the film of the x", "a b c d e f .", "she not the film"]


def entries(directory):
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def distance(library, compressed, name):
    """Relative distance of an adapter's updates from the restored ones, dense."""
    original, restored = library.read(name), compressed.read(name)
    error = norm = 0.0
    for slot in original.slots:
        expected, found = (s.b[slot.path].double() @ s.a[slot.path].double() for s in (original, restored))
        error, norm = error + (found - expected).square().sum(), norm + expected.square().sum()
    return float((error / norm).sqrt())


@pytest.fixture
def run(make_run):
    """A run whose adapters differ from one condition to the next in every factor."""
    made = make_run("gemma", LoraConfig(rank=4, alpha=6.0, scale_convention="alpha_over_sqrt_rank"))

    def forward(conditions):
        a, b = {}, {}
        for slot in made.base.slots:
            own = []
            for condition in conditions:
                generator = torch.Generator().manual_seed(int(1000 * condition.sum()))
                own.append(
                    (
                        torch.randn(4, slot.in_features, generator=generator) / 8,
                        torch.randn(slot.out_features, 4, generator=generator) / 8,
                    )
                )
            a[slot.path], b[slot.path] = (torch.stack(side) for side in zip(*own, strict=True))
        return LoraFactors(made.base.slots, a, b, made.hypernetwork.scale)

    made.hypernetwork.forward = forward
    return made


@pytest.fixture
def adapters(run, tmp_path):
    """Folder of six PEFT directories, one per dialect."""
    names = typology.varieties()[:COUNT]
    requests = [Request(f"d{number}", typology.parse_condition(f"dialect:{name}")) for number, name in enumerate(names)]
    return generate_adapters(run, requests, tmp_path / "adapters").directory


def test_the_reported_errors_are_those_of_the_files(adapters, tmp_path):
    made = compress_adapters(adapters, tmp_path / "small", 8)
    library, opened = Library(adapters, None), open_compressed(tmp_path / "small")
    assert entries(tmp_path / "small") == ["compressed.json", "compressed.safetensors", "hl_provenance.json"]
    assert opened.names == library.names and opened.rank == 8
    assert {slot.slot for slot in opened.slots} == set(library.slots)
    for name in library.names:
        assert distance(library, opened, name) == pytest.approx(opened.errors[name], rel=1e-4)
    assert 0.1 < opened.relative_error <= max(opened.errors.values())
    assert opened.relative_error <= opened.spread_error
    assert made.bytes_after == (tmp_path / "small" / "compressed.safetensors").stat().st_size
    assert made.bytes_before == sum(path.stat().st_size for path in adapters.glob("*/adapter_model.safetensors"))


def test_at_the_joint_rank_peft_directories_come_back_up_to_rounding_with_their_scale(adapters, tmp_path):
    compressed = compress_adapters(adapters, tmp_path / "small", 4 * COUNT)
    library = Library(adapters, None)
    for name in library.names:
        decompress_adapter(compressed, name, tmp_path / "restored" / name)
        old, new = adapters / name, tmp_path / "restored" / name
        assert (new / "adapter_config.json").read_text() == (old / "adapter_config.json").read_text()
        assert entries(new) == entries(old)
    restored = Library(tmp_path / "restored", None)
    assert (restored.rank, restored.scale, restored.slots) == (library.rank, library.scale, library.slots)
    for name in library.names:
        for slot in library.slots:
            expected, found = (side.read(name) for side in (library, restored))
            expected, found = (s.b[slot.path] @ s.a[slot.path] for s in (expected, found))
            assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    facts = json.loads((tmp_path / "restored" / "d0" / "hl_provenance.json").read_text())
    before = json.loads((adapters / "d0" / "hl_provenance.json").read_text())
    assert facts["condition"] == before["condition"] and facts["shared_basis_rank"] == 4 * COUNT
    assert facts["shared_basis_error"] < 1e-6
    assert "restored from bases of rank 24 that it shared with 5 others" in (new / "README.md").read_text()


def test_restored_directories_of_other_makers_are_complete(adapters, tmp_path):
    for directory in adapters.iterdir():
        (directory / "hl_provenance.json").unlink()
    decompress_adapter(compress_adapters(adapters, tmp_path / "small", 4), "d3", tmp_path / "d3")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "hl_provenance.json"]
    assert entries(tmp_path / "d3") == names


def test_divergence_falls_with_the_error_and_is_zero_at_the_joint_rank(run, adapters, tmp_path):
    found = [
        measure_divergence(
            run, Library(adapters, None), compress_adapters(adapters, tmp_path / str(rank), rank), TEXTS,
            maximum_adapters=3,
        )
        for rank in (2, 8, 24)
    ]  # fmt: skip
    assert found[0].restored > found[1].restored > 1e-4 > 1e-9 > found[2].restored >= 0
    assert all(each.restored <= each.worst for each in found)
    assert found[0].effect == found[2].effect > 1e-3
    assert found[2].top1_agreement == 1.0
    assert (found[0].adapters, found[0].texts) == (3, 3)


def test_divergence_is_the_mean_over_positions_that_torch_computes(run, adapters, tmp_path):
    library, compressed = Library(adapters, None), compress_adapters(adapters, tmp_path / "small", 3)
    found = measure_divergence(run, library, compressed, TEXTS[:1], maximum_adapters=1)
    encoded = run.base.tokenizer(TEXTS[0], return_tensors="pt")
    inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        p, q = (
            run.base.logits(**inputs, factors=side.read("d0"))[0].double().log_softmax(-1)
            for side in (library, compressed)
        )
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert found.restored == pytest.approx(expected, rel=1e-6)


@pytest.mark.gpu
def test_divergence_is_measured_on_the_device_of_the_base(run, adapters, tmp_path):
    compressed = compress_adapters(adapters, tmp_path / "small", 24)
    run.base.model.to("cuda")
    found = measure_divergence(run, Library(adapters, None), compressed, TEXTS[:1], maximum_adapters=1)
    assert found.restored < 1e-6 < found.effect


def test_adapters_for_another_base_are_not_compared(run, adapters, tmp_path):
    compressed = compress_adapters(adapters, tmp_path / "small", 4)
    run.base.fingerprint = "0" * 64
    with pytest.raises(CompressionError, match="not for the base"):
        measure_divergence(run, Library(adapters, None), compressed, TEXTS)


def test_adapters_that_do_not_belong_together_are_refused_and_nothing_is_written(adapters, tmp_path):
    path = adapters / "d2" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 99}))
    weights = adapters / "d4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(LibraryError, match=r"(?s)d4.*damaged.*d2: scale"):
        compress_adapters(adapters, tmp_path / "small", 4)
    assert entries(tmp_path) == ["adapters"]


def test_an_adapter_with_nan_is_refused_by_name_and_nothing_is_written(adapters, tmp_path):
    weights = adapters / "d1" / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(LibraryError, match="d1: holds NaN"):
        compress_adapters(adapters, tmp_path / "small", 4)
    assert entries(tmp_path) == ["adapters"]


def test_an_existing_directory_is_replaced_on_demand_and_only_if_it_is_ours(adapters, tmp_path):
    compress_adapters(adapters, tmp_path / "small", 4)
    with pytest.raises(OutputError, match="exists already"):
        compress_adapters(adapters, tmp_path / "small", 5)
    assert compress_adapters(adapters, tmp_path / "small", 5, force=True).rank == 5
    assert open_compressed(tmp_path / "small").rank == 5
    (tmp_path / "thesis").mkdir()
    with pytest.raises(OutputError, match="not written by hl_scale"):
        compress_adapters(adapters, tmp_path / "thesis", 5, force=True)


@pytest.mark.parametrize("damage", ["tensors", "manifest", "provenance", "missing", "deep"])
def test_damaged_sets_are_refused(adapters, tmp_path, damage):
    directory = compress_adapters(adapters, tmp_path / "small", 4).directory
    if damage == "tensors":
        path = directory / "compressed.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    elif damage == "manifest":
        path = directory / "compressed.json"
        path.write_text(path.read_text().replace("0.", "1.", 1))
    elif damage == "provenance":
        (directory / "hl_provenance.json").write_text("{}")
    elif damage == "deep":
        (directory / "hl_provenance.json").write_text("[" * 10**5)
    else:
        (directory / "compressed.json").unlink()
    with pytest.raises(CompressionError, match="fix: pass a directory that"):
        open_compressed(directory)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda tensor: tensor.fill_(float("nan")), ExportError, "NaN or infinity in 1"),
        (lambda tensor: tensor[:, :-1], CompressionError, "cannot be read"),
    ],
)
def test_a_set_of_someone_else_that_holds_no_adapters_is_not_restored(adapters, tmp_path, change, error, message):
    directory = compress_adapters(adapters, tmp_path / "small", 4).directory
    path, facts = directory / "compressed.safetensors", json.loads((directory / "hl_provenance.json").read_text())
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".U"))
    save_file({**tensors, name: change(tensors[name]).contiguous()}, path)
    facts["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (directory / "hl_provenance.json").write_text(json.dumps(facts))
    with pytest.raises(error, match=message):
        decompress_adapter(open_compressed(directory), "d0", tmp_path / "out")
    assert entries(tmp_path) == ["adapters", "small"]


def test_an_unknown_name_is_refused_and_cannot_lead_elsewhere(adapters, tmp_path):
    compressed = compress_adapters(adapters, tmp_path / "small", 4)
    for name in ("d9", "../adapters/d0"):
        with pytest.raises(CompressionError, match="holds no adapter"):
            decompress_adapter(compressed, name, tmp_path / "out")
    assert entries(tmp_path) == ["adapters", "small"]


def test_the_commands_report_errors_sizes_and_divergence(run, adapters, tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["hl-scale", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 0
        return capsys.readouterr().out

    monkeypatch.setattr("hl_scale.cli.adapters.open_run", lambda *arguments: run)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    small = tmp_path / "small"
    said = call("compress", adapters, "--out", small, "--rank", 6, "--run", "run", "--texts", tmp_path / "texts.txt")
    for slot in run.base.slots:
        assert slot.path in said
    assert "relative error" in said and "times smaller" in said and "next-token divergence" in said
    assert json.loads((small / "hl_provenance.json").read_text())["divergence"]["restored"] > 0
    assert "adapter: " in call("decompress", small, "d1", "--out", tmp_path / "d1")
    assert entries(tmp_path / "d1") == entries(adapters / "d1")
