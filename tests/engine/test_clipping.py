"""Heads with a bound and a rate of their own: what they do does not reach the rest."""

from __future__ import annotations

import math

import pytest
import torch

from hl_scale.engine import checkpoint
from hl_scale.engine.clipping import clip_factor
from hl_scale.engine.loop import train

pytestmark = pytest.mark.usefixtures("single_process")


def moved(directory):
    """Largest change of any head weight, and of anything else, from the first checkpoint to the last."""
    first, *_, last = [checkpoint.read_full(checkpoint.newest(directory / "checkpoints", step)[0]) for step in (2, 6)]
    found = {True: 0.0, False: 0.0}
    for name, kinds in last.items():
        change = (kinds["master"] - first[name]["master"]).abs().max().item()
        head = "heads_" in name
        found[head] = max(found[head], change)
    return found[True], found[False]


def test_a_bound_that_stops_the_rest_leaves_the_heads_free(tiny_config, tmp_path):
    stopped = {"training.gradient_clipping": 1e-15, "training.head_gradient_clipping": 1.0}
    train(tiny_config(tmp_path, stopped))
    heads, rest = moved(tmp_path)
    assert heads > 1e-3 and rest < 1e-6


def test_bounds_that_nothing_reaches_change_nothing(tiny_config, losses_of, tmp_path):
    train(tiny_config(tmp_path / "one", {"training.gradient_clipping": 1e9}))
    train(tiny_config(tmp_path / "two", {"training.gradient_clipping": 1e9, "training.head_gradient_clipping": 1e9}))
    assert losses_of(tmp_path / "one") == losses_of(tmp_path / "two")


def test_the_heads_learn_at_their_own_rate_and_a_stopped_run_goes_on_bit_for_bit(tiny_config, losses_of, tmp_path):
    slow = {"training.head_learning_rate_ratio": 1e-4, "training.head_gradient_clipping": 0.1}
    train(tiny_config(tmp_path / "whole", slow))
    heads, _ = moved(tmp_path / "whole")
    assert 0 < heads < 1e-5
    train(tiny_config(tmp_path / "parts", slow), stop_at=3)
    train(tiny_config(tmp_path / "parts", slow))
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


def test_a_hypernetwork_without_heads_is_refused(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="are for hypernetworks with heads"):
        train(tiny_config(tmp_path, {"hypernetwork": {"kind": "plain_lora"}, "training.head_gradient_clipping": 0.1}))


@pytest.mark.parametrize(
    ("norms", "bound", "loss_scale", "expected"),
    [
        ([3.0, 4.0], 1.0, 1.0, 0.2),
        ([3.0, 4.0], 10.0, 1.0, 1.0),
        ([30.0, 40.0], 1.0, 10.0, 0.02),
        ([7.0], 0.0, 2.0, 0.5),
    ],
)
def test_gradients_come_down_to_their_bound(norms, bound, loss_scale, expected):
    factor = clip_factor([torch.tensor(norm) for norm in norms], bound, loss_scale)
    assert math.isclose(factor, expected, rel_tol=1e-6)
