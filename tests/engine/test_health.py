"""What shows no error is said: a condition without effect, a parameter without gradients."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hl_scale.engine import alignment, loop
from hl_scale.engine.loop import TrainingAborted, train

pytestmark = pytest.mark.usefixtures("single_process")
LONGER = {"training.steps": 12, "training.save_every": 12}


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def test_what_the_condition_does_to_the_loss_is_measured_at_every_checkpoint(tiny_config, tmp_path, capsys):
    train(tiny_config(tmp_path / "run", LONGER))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "condition_effect" in line] == [12]
    assert abs(lines[-1]["condition_effect"]) > 1e-5
    assert "does not depend on its condition" not in said(capsys)


def test_an_adapter_that_ignores_its_condition_is_reported(tiny_config, write_tiny_corpus, tmp_path, capsys):
    def all_but_equal(rows):
        for number, row in enumerate(rows):
            row["vector"] = (np.full(len(row["vector"]), 0.5) + 1e-7 * number).tolist()

    corpus = write_tiny_corpus(tmp_path / "corpus", all_but_equal)
    train(tiny_config(tmp_path / "run", {**LONGER, "data.directory": str(corpus)}))
    assert "warning: the loss is" in (text := said(capsys)) and "does not depend on its condition" in text


def test_a_parameter_that_no_gradient_reaches_is_named(tiny_config, tmp_path, capsys, monkeypatch):
    build = loop.build_hypernetwork

    def with_unused(*arguments):
        network = build(*arguments)
        network.forgotten = torch.nn.Parameter(torch.ones(7))
        return network

    monkeypatch.setattr(loop, "build_hypernetwork", with_unused)
    train(tiny_config(tmp_path / "run"))
    assert "warning: no gradient has reached 1 parameters: hypernetwork.forgotten" in said(capsys)


def test_a_run_in_which_nothing_is_learnt_is_ended(tiny_config, tmp_path, monkeypatch):
    forward = alignment.AlignmentModule.forward
    monkeypatch.setattr(alignment.AlignmentModule, "forward", lambda self, batch: forward(self, batch) * 0.0)
    with pytest.raises(TrainingAborted, match="no gradient has reached any parameter in 2 steps"):
        train(tiny_config(tmp_path / "run"))
