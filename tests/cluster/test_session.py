"""What a driver makes of a configuration before workers get it."""

from __future__ import annotations

from hl_scale.cluster.session import with_absolute_paths


def test_workers_get_absolute_paths_of_what_the_configuration_names_and_of_nothing_else(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = tiny_config("runs/a", {"lora.task_adapter": "adapters/mood", "base.model": "somebody/a-model"})
    found = with_absolute_paths(config)
    assert found.lora.task_adapter == str(tmp_path / "adapters" / "mood")
    assert found.run.directory == str(tmp_path / "runs" / "a") and found.base.model == "somebody/a-model"
    assert with_absolute_paths(tiny_config("runs/a")).lora.task_adapter is None
