"""The configuration: strict, complete in its complaints, layered, and free of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hl_scale.config import Config, ConfigError, dump_config, load_config, parse_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def tree(**sections: dict[str, Any]) -> dict[str, Any]:
    """The smallest complete configuration, with `sections` laid over it."""
    smallest: dict[str, dict[str, Any]] = {
        "run": {"directory": "runs/x"},
        "base": {"model": "some/model"},
        "data": {"directory": "data/x", "sources": [{"kind": "text", "path": "x.txt"}]},
        "training": {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
    }
    return {name: smallest.get(name, {}) | sections.get(name, {}) for name in {**smallest, **sections}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree()))
    return file


def complaint(**sections: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree(**sections))
    return str(caught.value)


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda recipe: recipe.stem)
def test_every_recipe_loads_and_survives_a_dump(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, environment={})
    (tmp_path / "dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "dumped.yaml", environment={}) == config


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda recipe: recipe.stem)
def test_every_variety_of_a_recipe_exists_and_its_batch_fits_its_workers(recipe: Path) -> None:
    from hl_scale.conditions.sources import source
    from hl_scale.data.sampling import plan_batches

    config = load_config(recipe, environment={})
    varieties = (
        ()
        if config.data.kind == "tasks"
        else (
            *config.data.training_varieties,
            *config.data.evaluation_varieties,
        )
    )
    for name in varieties:
        assert source(config.dialects.vectors).resolve(name) == name
    assert isinstance(config.cluster.num_workers, int)
    plan = plan_batches(config.training.global_batch_size, config.training.micro_batch_size, config.cluster.num_workers)
    assert plan.weight(plan.micro_batch) == 1.0, "all shares are equal"


def test_the_published_recipe_leaves_nigerian_english_unseen() -> None:
    data = load_config(CONFIGS[0].parent / "hyperlora_roberta_base.yaml", environment={}).data
    assert set(data.evaluation_varieties) - set(data.training_varieties) == {"Nigerian English"}


def test_an_unknown_key_is_refused_with_the_nearest_known_name() -> None:
    message = complaint(training={"learnin_rate": 1.0})
    assert "training.learnin_rate" in message and "did you mean 'learning_rate'?" in message


def test_an_unknown_key_far_from_all_names_lists_them() -> None:
    message = complaint(lora={"qqqqqqq": 1})
    assert "known keys here: rank, alpha, scale_convention, target_modules" in message


def test_an_unknown_key_inside_a_list_of_sections_gets_the_names_of_that_section() -> None:
    message = complaint(data={"sources": [{"kind": "text", "path": "x", "colum": "y"}]})
    assert "data.sources.0.colum" in message and "did you mean 'column'?" in message


def test_all_problems_are_reported_at_once_with_path_value_reason_and_fix() -> None:
    message = complaint(lora={"rank": 0}, training={"steps": "many"}, objective={"blur": -1}, zero3={"offload": "disk"})
    assert "4 problems" in message
    for path in ("lora.rank = 0", "training.steps = 'many'", "objective.blur = -1", "zero3.offload = 'disk'"):
        assert path in message
    assert message.count("why: ") == message.count("fix: ") == 4
    assert "use one of 'none' or 'cpu'" in message


def test_a_range_of_workers_that_is_upside_down_is_refused() -> None:
    message = complaint(cluster={"num_workers": [8, 4]}, training={"steps": 1, "global_batch_size": 32})
    assert "cluster.num_workers = [8, 4]: the minimum is larger than the maximum" in message


def test_the_help_text_of_a_field_is_the_fix() -> None:
    assert "fix: Rank r of every generated adapter." in complaint(lora={"rank": -3})


@pytest.mark.parametrize(
    ("sections", "help_text"),
    [
        ({"cluster": {"num_workers": "two"}}, "Ray Train workers, or [minimum, maximum]"),
        ({"cluster": {"num_workers": 0}}, "Ray Train workers, or [minimum, maximum]"),
        ({"lora": {"target_modules": [["nested"]]}}, "Names of the linear layers that receive an adapter"),
    ],
)
def test_a_wrong_element_of_a_union_or_a_list_gets_the_help_of_its_field(
    sections: dict[str, Any], help_text: str
) -> None:
    assert f"fix: {help_text}" in complaint(**sections)


def test_a_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match=r"(?s)training.*fix: add this key"):
        parse_config({name: section for name, section in tree().items() if name != "training"})


def test_later_layers_win_defaults_then_file_then_environment_then_arguments(path: Path) -> None:
    def rank(environment: dict[str, str], overrides: list[str]) -> int:
        return load_config(path, overrides, environment).lora.rank

    assert rank({}, []) == 8
    path.write_text(yaml.safe_dump(tree(lora={"rank": 5})))
    assert rank({}, []) == 5
    assert rank({"HL_SCALE_LORA__RANK": "6"}, []) == 6
    assert rank({"HL_SCALE_LORA__RANK": "6"}, ["lora.rank=7"]) == 7


def test_the_process_environment_is_read_unless_another_is_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HL_SCALE_RUN__SEED", "17")
    assert load_config(path).run.seed == 17
    assert load_config(path, environment={}).run.seed == 0


def test_environment_variables_without_a_section_are_not_keys(path: Path) -> None:
    assert load_config(path, environment={"HL_SCALE_RESOURCES": "/somewhere"}).lora.rank == 8


def test_one_file_serves_for_a_run_and_for_a_control_of_another_kind() -> None:
    file = next(path for path in CONFIGS if path.name == "t2l_mistral7b.yaml")
    assert "head_width" in file.read_text(encoding="utf-8")
    control = load_config(file, ["hypernetwork.kind=plain_lora"], {})
    assert control.hypernetwork.kind == "plain_lora" and control.training == load_config(file, (), {}).training
    with pytest.raises(ConfigError, match=r"hypernetwork\.head_width = 3"):
        load_config(file, ["hypernetwork.head_width=3", "hypernetwork.kind=plain_lora"], {})
    with pytest.raises(ConfigError, match=r"one of 'hyperlora', 'hyperlora\.paper', 'plain_lora', 'text_to_lora'"):
        load_config(file, ["hypernetwork.kind=nothing"], {})


def test_overrides_are_yaml_values(path: Path) -> None:
    config = load_config(
        path, ["training.learning_rate=2e-3", "lora.target_modules=[a, b]", "cluster.num_workers=[1, 2]"], {}
    )
    assert config.training.learning_rate == 2e-3
    assert config.lora.target_modules == ("a", "b")
    assert config.cluster.num_workers == (1, 2)


@pytest.mark.parametrize("override", ["training.steps", "steps=3", "=3", ""])
def test_an_override_that_is_no_assignment_is_refused(path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form section\.key=value"):
        load_config(path, [override], {})


def test_an_override_or_a_variable_that_is_broken_yaml_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"override 'lora.target_modules=\[a' does not hold a YAML value"):
        load_config(path, ["lora.target_modules=[a"], {})
    with pytest.raises(ConfigError, match=r"HL_SCALE_LORA__TARGET_MODULES='\[a' does not hold a YAML value"):
        load_config(path, [], {"HL_SCALE_LORA__TARGET_MODULES": "[a"})


def test_an_override_through_a_value_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match="directory is not a section"):
        load_config(path, ["run.directory.name=x"], {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)not found: .*absent\.yaml.*fix: "):
        load_config(tmp_path / "absent.yaml", environment={})


@pytest.mark.parametrize("text", ["- a\n- b\n", "just a word", ""])
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"must hold a mapping of sections, found (list|str|NoneType)"):
        load_config(tmp_path / "config.yaml", environment={})


@pytest.mark.parametrize("content", [b"run: [unclosed", b"run: {directory: \xff\xfe}"])
def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(tmp_path / "config.yaml", environment={})


def test_remote_code_without_a_revision_is_refused() -> None:
    assert "set base.revision to the commit you reviewed" in complaint(base={"trust_remote_code": True})
    allowed = parse_config(tree(base={"trust_remote_code": True, "revision": "0123abc"}))
    assert allowed.base.trust_remote_code


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"mode": "named"}, "needs data.training_varieties"),
        ({"minimum_density": 0.7, "maximum_density": 0.2}, "minimum_density is larger"),
        ({"minimum_words": 9, "maximum_words": 3}, "minimum_words is larger"),
        ({"sources": []}, "mode 'virtual' needs data.sources"),
        ({"vectors": "lang2vec"}, "belong to mode 'parallel', not to 'virtual'"),
        ({"mode": "parallel"}, "mode 'parallel' needs data.pairs"),
        ({"sources": [{"kind": "hub"}]}, "needs a path"),
        ({"sources": [{"kind": "vader", "name": "poems"}]}, "one of movie, news, product, tweets"),
    ],
)
def test_data_settings_that_contradict_each_other_are_refused(data: dict[str, Any], reason: str) -> None:
    assert reason in complaint(data=data)


def test_a_configuration_cannot_be_changed_after_it_was_validated() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_config(tree()).run.seed = 3


def test_every_field_has_a_help_text() -> None:
    sections = Config.model_json_schema()["$defs"]
    assert {"DialectDataConfig", "TaskDataConfig", "TaskSource", "TextToLoraConfig", "Zero3Config"} <= set(sections)
    for name, section in sections.items():
        for key, field in section["properties"].items():
            assert field.get("description"), f"{name}.{key}"


def test_a_kind_of_section_refuses_the_keys_of_another_and_names_no_tag() -> None:
    message = complaint(data={"kind": "tasks", "sources": [{"kind": "builtin"}], "identity_per_sentence": 2})
    assert "data.identity_per_sentence = 2" in message and "data.tasks" not in message
    assert "training_examples" in complaint(data={"kind": "tasks", "training_example": 2})


def test_data_objective_and_conditions_must_fit_each_other() -> None:
    tasks = {"kind": "tasks", "directory": "d", "sources": [{"kind": "builtin"}]}
    assert "supervised or reconstruction" in complaint(data=tasks)
    assert "leave conditions out" in complaint(conditions={"kind": "one_hot"})
    assert "use one of 'alignment', 'supervised'" in complaint(objective={"kind": "distillation"})


def test_the_configuration_imports_no_torch() -> None:
    code = (
        "import sys, hl_scale.config;"
        "print(sorted({'torch', 'transformers', 'deepspeed', 'ray', 'datasets'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
