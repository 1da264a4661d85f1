"""One layer, one head, three tokens: adapted by the adaptations themselves, compared with arithmetic in numpy.

The layer is z = a + relu(a W1) W2 with a = X + softmax(X Wq (X Wk)^T / sqrt(3)) X Wv: no biases, no norm, no output
projection (an identity stands there, because adapters sit behind it).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hl_scale.adaptations import Adaptation, build_adaptation
from hl_scale.base import AdaptedModel, FrozenLinear
from hl_scale.config import LoraConfig

Array = NDArray[np.float64]
X = np.array([[0.8109, -0.9391, 0.2519], [2.1968, 0.4785, 1.5207], [-0.3264, 0.1585, 0.8469]])
WQ = np.array([[0.8571, 0.1942, -1.1185], [1.6184, -0.2665, -0.9808], [-1.2820, -0.1892, 0.7269]])
WK = np.array([[0.2176, -0.2462, 0.0557], [0.6926, -2.0236, -0.2968], [-0.6658, -2.5785, -0.4534]])
WV = np.array([[-0.2016, 1.4234, -0.1733], [1.3098, -0.4815, 0.0123], [0.1350, 0.3998, 0.4573]])
W1 = np.array([[0.5325, 0.7081, -1.1454], [0.5511, 0.6274, -0.8078], [1.0224, 0.4148, -0.4800]])
W2 = np.array([[-1.3081, 1.9878, 2.6332], [2.6049, 0.9369, -0.9614], [0.2293, 0.3262, 0.7968]])
# What the attention sublayer adds to X, and what the layer returns.
BIDIRECTIONAL = (
    [[-0.7098, 1.4047, 0.1288], [0.1002, 1.9549, 0.3040], [-0.1147, 1.7538, 0.2594]],
    [[0.5448, 2.3451, 1.7216], [6.6879, 14.9026, 9.7301], [0.5152, 7.0498, 4.9465]],
)
CAUSAL = (
    [[-1.3596, 1.7072, -0.0369], [-0.0467, 3.0566, 0.2315], [-0.1147, 1.7538, 0.2594]],
    [[-0.5321, 1.6367, 0.9634], [7.3975, 17.4307, 10.3197], [0.5152, 7.0499, 4.9466]],
)
# Of the adaptations: two rows of A (or D, or prefix keys), two columns of B (or U), biases.
A_Q, B_Q = np.array([[0.5, -1.0, 0.25], [1.5, 0.0, -0.5]]), np.array([[1.0, -0.5], [0.25, 2.0], [-1.5, 0.75]])
A_V, B_V = np.array([[-0.75, 0.5, 1.0], [0.0, 1.25, -0.25]]), np.array([[0.5, 1.0], [-1.0, 0.5], [0.25, -0.25]])
KEYS, VALUES = np.array([[0.4, -1.2, 0.3], [-0.8, 0.6, 1.1]]), np.array([[1.0, -2.0, 0.5], [-0.5, 0.25, 3.0]])
BIAS, OTHER_BIAS = np.array([0.3, -0.1]), np.array([-0.2, 0.1, 0.4])


class Attention(nn.Module):
    """The sublayer's attention, with the calls that a transformers model makes."""

    def __init__(self, names: tuple[str, str, str], causal: bool) -> None:
        super().__init__()
        self.names, self.is_causal, self.head_dim = names, causal, 3
        for name, weight in zip(names, (WQ, WK, WV), strict=True):
            self.add_module(name, frozen(weight))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None
    ) -> Tensor:
        query, key, value = (self.get_submodule(name)(hidden_states)[:, None] for name in self.names)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, 0)
        scores = query @ key.mT / math.sqrt(3)
        if attention_mask is None and self.is_causal:
            attention_mask = torch.ones_like(scores, dtype=torch.bool).tril()
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, -math.inf)
        return (scores.softmax(-1) @ value)[:, 0]


class DecoderBlock(nn.Module):
    """The layer under the names of Gemma, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention(("q_proj", "k_proj", "v_proj"), causal=True)
        self.self_attn.o_proj = frozen(np.eye(3))
        self.mlp = nn.Sequential(frozen(W1), nn.ReLU(), frozen(W2))

    def forward(self, x: Tensor) -> Tensor:
        a = x + self.self_attn.o_proj(self.self_attn(hidden_states=x))
        return a + self.mlp(a)


class EncoderBlock(nn.Module):
    """The layer under the names of BERT, bidirectional."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = nn.Module(), nn.Module(), nn.Module()
        self.attention.self = Attention(("query", "key", "value"), causal=False)
        self.attention.output = nn.Module()
        self.attention.output.dense = frozen(np.eye(3))
        self.intermediate.dense, self.output.dense = frozen(W1), frozen(W2)

    def forward(self, x: Tensor) -> Tensor:
        a = x + self.attention.output.dense(self.attention.self(x))
        return a + self.output.dense(torch.relu(self.intermediate.dense(a)))


class Model(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=3, max_position_embeddings=8, model_type="three tokens")
        self.embedding = nn.Embedding.from_pretrained(torch.tensor(X))
        self.layers = nn.ModuleList([DecoderBlock() if causal else EncoderBlock()])

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.layers[0](self.embedding(input_ids)))


def frozen(weight: Array) -> FrozenLinear:
    """x -> x W."""
    return FrozenLinear(torch.tensor(weight.T))


def three_tokens(causal: bool) -> AdaptedModel:
    targets = ("q_proj", "v_proj") if causal else ("query", "value")
    return AdaptedModel(Model(causal), None, LoraConfig(rank=2, target_modules=targets), "three tokens")


def run(base: AdaptedModel, adaptation: Adaptation | None = None, conditions: Tensor | None = None) -> Array:
    """Layer outputs (rows, 3, 3)."""
    rows = 1 if conditions is None else len(conditions)
    ids = torch.arange(3).expand(rows, -1)
    with torch.no_grad():
        if adaptation is None:
            return base.hidden_states(ids, torch.ones_like(ids)).numpy()
        with adaptation.attached(base, conditions):
            return base.hidden_states(ids, torch.ones_like(ids)).numpy()


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attend(query: Array, key: Array, value: Array, causal: bool) -> Array:
    """Tokens see the last three keys as the layer says, and those before them always."""
    scores = query @ key.T / np.sqrt(3)
    if causal:
        for token in range(3):
            scores[token, len(key) - 3 + token + 1 :] = -np.inf
    return softmax(scores) @ value


def feed_forward(a: Array) -> Array:
    return np.maximum(a @ W1, 0) @ W2


@pytest.mark.parametrize("causal", [False, True])
def test_the_layer_without_adaptation_gives_the_known_numbers(causal: bool) -> None:
    attention, output = CAUSAL if causal else BIDIRECTIONAL
    base = three_tokens(causal)
    a = attend(X @ WQ, X @ WK, X @ WV, causal)
    np.testing.assert_allclose(a, attention, atol=1e-3)
    np.testing.assert_allclose(X + a + feed_forward(X + a), output, atol=1e-3)
    np.testing.assert_allclose(run(base)[0], X + a + feed_forward(X + a), rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_a_lora_changes_the_weights_of_its_slots_by_s_b_a(causal: bool) -> None:
    base = three_tokens(causal)
    adaptation = build_adaptation("lora", base, {"rank": 2, "scale": 0.5}).double()
    tables = adaptation.tables
    with torch.no_grad():
        tables.tables_a["3x3"].weight.copy_(torch.tensor(np.stack([A_Q.ravel(), A_V.ravel()])))
        tables.tables_b["3x3"].weight.copy_(torch.tensor(np.stack([B_Q.ravel(), B_V.ravel()])))
    # A layer is x W here and W x there, so the update is transposed.
    wq, wv = WQ + 0.5 * (B_Q @ A_Q).T, WV + 0.5 * (B_V @ A_V).T
    a = X + attend(X @ wq, X @ WK, X @ wv, causal)
    np.testing.assert_allclose(run(base, adaptation)[0], a + feed_forward(a), rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_a_prefix_adds_keys_and_values_that_every_token_attends_to(causal: bool) -> None:
    base = three_tokens(causal)
    adaptation = build_adaptation("prefix", base, {"prefix_length": 2}).double()
    with torch.no_grad():
        adaptation.tables[0].weight.copy_(torch.tensor(np.concatenate((KEYS, VALUES), axis=1)))
    key, value = np.concatenate((KEYS, X @ WK)), np.concatenate((VALUES, X @ WV))
    a = X + attend(X @ WQ, key, value, causal)
    np.testing.assert_allclose(run(base, adaptation)[0], a + feed_forward(a), rtol=1e-12)


def test_a_prefix_begins_as_the_keys_and_values_of_tokens() -> None:
    base = three_tokens(causal=True)
    table = build_adaptation("prefix", base, {"prefix_length": 11}).tables[0].weight.detach().numpy()
    of_tokens = np.concatenate((X @ WK, X @ WV), axis=1)
    found = np.abs(table[:, None] - of_tokens[None]).max(-1) < 1e-6
    assert (found.sum(1) == 1).all() and found.any(0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_bottleneck_adapters_change_both_sublayers_before_the_skip_connection(causal: bool) -> None:
    base = three_tokens(causal)
    adaptation = build_adaptation("bottleneck", base, {"width": 2}).double()
    with torch.no_grad():
        for adapter, down, up in ((adaptation.attention[0], A_Q, B_Q), (adaptation.feed_forward[0], A_V, B_V)):
            for parameter, number in zip(adapter.parameters(), (down, BIAS, up, OTHER_BIAS), strict=True):
                parameter.copy_(torch.tensor(number))
    a = attend(X @ WQ, X @ WK, X @ WV, causal)
    a = X + a + np.maximum(a @ A_Q.T + BIAS, 0) @ B_Q.T + OTHER_BIAS
    f = feed_forward(a)
    f = f + np.maximum(f @ A_V.T + BIAS, 0) @ B_V.T + OTHER_BIAS
    np.testing.assert_allclose(run(base, adaptation)[0], a + f, rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_generated_adapters_are_those_of_each_rows_condition(causal: bool) -> None:
    base = three_tokens(causal)
    sizes = {"width": 2, "condition_width": 4, "embedding_width": 3, "hidden_width": 5}
    adaptation = build_adaptation("hyper_adapter", base, sizes, condition_size=2).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in adaptation.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    conditions = torch.tensor([[1.0, -0.5], [0.25, 2.0]], dtype=torch.float64)
    found = run(base, adaptation, conditions)
    p = {name: value.detach().numpy() for name, value in adaptation.named_parameters()}

    def generated(condition: Array, position: int) -> tuple[Array, Array, Array, Array]:
        encoded = p["condition.weight"] @ condition + p["condition.bias"]
        z = np.concatenate((encoded, p["layer_embedding.weight"][0], p["position_embedding.weight"][position]))
        g = np.maximum(p["input.weight"] @ z + p["input.bias"], 0)
        normed = (g - g.mean()) / np.sqrt(g.var() + 1e-5) * p["norm.weight"] + p["norm.bias"]
        first = np.maximum(p["first.weight"] @ normed + p["first.bias"], 0)
        h = (g + p["second.weight"] @ first + p["second.bias"]) / np.sqrt(5)
        d, b, u, c = (
            p[f"head_{name}.weight"] @ h + p[f"head_{name}.bias"] for name in ("down", "down_bias", "up", "up_bias")
        )
        return d.reshape(2, 3), b, u.reshape(3, 2), c

    for row, condition in enumerate(conditions.numpy()):
        (d, b, u, c), (d2, b2, u2, c2) = generated(condition, 0), generated(condition, 1)
        a = attend(X @ WQ, X @ WK, X @ WV, causal)
        a = X + a + np.maximum(a @ d.T + b, 0) @ u.T + c
        f = feed_forward(a)
        f = f + np.maximum(f @ d2.T + b2, 0) @ u2.T + c2
        np.testing.assert_allclose(found[row], a + f, rtol=1e-9)
