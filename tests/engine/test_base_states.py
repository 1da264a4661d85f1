"""Encoders of descriptions that are the base itself, and several encoders side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hl_scale.base import AdaptedModel
from hl_scale.base.loading import load_base
from hl_scale.base.recompute import find_blocks
from hl_scale.conditions.descriptions import EncoderError
from hl_scale.config import Config, ConfigError
from hl_scale.data.builtin import reference_wordings
from hl_scale.engine.base_states import LastStateEncoder, MeanStateEncoder, TokenStateEncoder
from hl_scale.engine.conditions import condition_size, open_conditions
from hl_scale.engine.loop import train
from hl_scale.engine.run import load_run

TEXTS = ["said the first", "asked them", "this is any last working here"]


@pytest.fixture
def base(tiny_config: Callable[..., Config], tmp_path: Path) -> AdaptedModel:
    config = tiny_config(tmp_path / "run")
    return load_base(config.base, config.lora, torch.device("cpu"))


def mean_state(base: AdaptedModel, text: str) -> np.ndarray:
    """By a loop over one text, from the hidden states that transformers returns."""
    tokens = base.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        found = base.model.base_model(**tokens, use_cache=False, output_hidden_states=True).hidden_states
    block = (len(find_blocks(base.model)) - 1) // 3
    return found[block + 1][0, 1:].double().mean(0).numpy()


def test_mean_states_are_those_of_each_text_alone_standardised_by_reference_wordings(
    base: AdaptedModel, tmp_path: Path
) -> None:
    encoder = MeanStateEncoder(base, 256, tmp_path)
    reference = np.stack([mean_state(base, text) for text in reference_wordings()])
    plain = np.stack([mean_state(base, text) for text in TEXTS])
    expected = (plain - reference.mean(0)) / (reference.std(0) + 1e-6)
    expected *= np.sqrt(base.hidden_size) / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=2e-3)
    assert list(tmp_path.glob("*.safetensors"))  # the states of the reference are kept


def test_the_last_state_is_that_of_the_last_token(base: AdaptedModel) -> None:
    encoded = LastStateEncoder(base, 256).encode(TEXTS)
    for text, row in zip(TEXTS, encoded, strict=True):
        tokens = base.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            state = base.hidden_states(tokens["input_ids"], tokens["attention_mask"])[0, -1].numpy()
        np.testing.assert_allclose(row, state * np.sqrt(len(state)) / np.linalg.norm(state), rtol=1e-3, atol=1e-3)


def test_token_states_are_those_of_each_token_standardised_with_padding_of_zeros(
    base: AdaptedModel, tmp_path: Path
) -> None:
    encoder = TokenStateEncoder(base, 12, tmp_path)
    encoded = encoder.encode(TEXTS).reshape(len(TEXTS), 12, base.hidden_size)
    mean, spread = MeanStateEncoder(base, 256, tmp_path).moments
    block = (len(find_blocks(base.model)) - 1) // 3
    for text, rows in zip(TEXTS, encoded, strict=True):
        tokens = base.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = base.model.base_model(**tokens, use_cache=False, output_hidden_states=True).hidden_states
        expected = (states[block + 1][0, 1:].numpy() - mean) / spread
        expected *= np.sqrt(base.hidden_size) / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(rows[: len(expected)], expected, atol=5e-3)
        assert not rows[len(expected) :].any() and len(expected) < 12


def test_blocks_after_the_wanted_one_are_not_run(base: AdaptedModel, tmp_path: Path) -> None:
    encoder = MeanStateEncoder(base, 256, tmp_path)
    ran: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(find_blocks(base.model).values())
    ]
    encoder.encode(TEXTS)
    for hook in hooks:
        hook.remove()
    assert set(ran) == set(range((len(hooks) - 1) // 3 + 1))


def test_hooks_leave_no_trace_and_refused_texts_are_named(base: AdaptedModel, tmp_path: Path) -> None:
    encoder = MeanStateEncoder(base, 8, tmp_path)
    with pytest.raises(EncoderError, match="more than 8"):
        encoder.encode(["said the first " * 5])
    assert not any(block._forward_hooks for block in find_blocks(base.model).values())


def test_encoders_stand_side_by_side_and_the_width_is_known_without_weights(
    tiny_config: Callable[..., Config], tiny_tasks: dict[str, Any], base: AdaptedModel, tmp_path: Path
) -> None:
    def size(encoder: str) -> int:
        config = tiny_config(tmp_path / "run", {**tiny_tasks, "conditions": {"encoder": encoder}})
        conditions = open_conditions(config, base)
        assert conditions.size == condition_size(config, base)
        found[encoder] = conditions.encoder.encode(TEXTS)
        fingerprints.add(conditions.fingerprint)
        return conditions.size

    found: dict[str, np.ndarray] = {}
    fingerprints: set[str] = set()
    width = base.hidden_size
    assert [size("base"), size("base_mean"), size("base_mean + base")] == [width, width, 2 * width]
    np.testing.assert_array_equal(
        found["base_mean + base"], np.concatenate([found["base_mean"], found["base"]], axis=1)
    )
    assert len(fingerprints) == 3


@pytest.mark.parametrize("encoder", ["base + base", " + base", "base + "])
def test_encoders_are_named_once_each(
    tiny_config: Callable[..., Config], tiny_tasks: dict[str, Any], tmp_path: Path, encoder: str
) -> None:
    with pytest.raises(ConfigError, match="each encoder is named once"):
        tiny_config(tmp_path, {**tiny_tasks, "conditions": {"encoder": encoder}})


def test_a_run_that_pools_tokens_trains_and_describes_what_it_was_trained_with(
    tiny_config: Callable[..., Config], tiny_tasks: dict[str, Any], tmp_path: Path
) -> None:
    pooled = {
        "conditions": {"encoder": "base_tokens", "maximum_tokens": 12, "noise": 0.1},
        "hypernetwork": {"kind": "text_to_lora", "latent_width": 16, "head_width": 8, "condition_tokens": 12},
        "training.steps": 2,
    }
    config = tiny_config(tmp_path / "run", {**tiny_tasks, **pooled})
    assert train(config).step == 2
    run = load_run(tmp_path / "run")
    assert run.conditions.size == 12 * run.base.hidden_size
    first, other = (run.conditions.parse(f"description:{text}").vector for text in ("said the first", "asked them"))
    assert run.hypernetwork is not None
    factors = run.hypernetwork(torch.from_numpy(np.stack([first, other])))
    path = run.base.slots[0].path
    assert not torch.equal(factors.b[path][0], factors.b[path][1])


@pytest.mark.parametrize(("encoder", "tokens"), [("base_tokens", None), ("base_tokens", 5), ("base_mean", 12)])
def test_tokens_are_pooled_if_and_only_if_conditions_are_tokens(
    tiny_config: Callable[..., Config], tiny_tasks: dict[str, Any], tmp_path: Path, encoder: str, tokens: int | None
) -> None:
    changes = {
        "conditions": {"encoder": encoder, "maximum_tokens": 12},
        "hypernetwork": {"kind": "text_to_lora", "condition_tokens": tokens},
    }
    with pytest.raises(ConfigError, match=r"condition_tokens = .* does not fit conditions\.encoder"):
        tiny_config(tmp_path / "run", {**tiny_tasks, **changes})
