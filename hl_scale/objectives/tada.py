"""TADA, task-agnostic dialect adapters (Held et al. 2023, arXiv 2305.16651): alignment of sentences, and a critic.

Of a dialect sentence with the adapter, states x, and of its Standard English original without it, states y:

    loss = mean |s(x) - s(y)|^2 / D  +  cross-entropy of a critic that tells x (1) from y (0)

s is the state of the sentence. The critic reads all token states, one transformer layer and an MLP, and is trained by
the same loss; on their way back to the adapter its gradients change sign, so that the adapter learns to be taken for
Standard English. `adversary_weight` multiplies them there, and only there: the critic's own training does not depend on
it. TADA trains bottleneck adapters (`hl_scale.adaptations`), here any adaptation.

The published code sums over D instead of taking the mean, and has no weight: the default, 1 / D, is its balance. It
differs in this: its critic is trained on the difference of unbounded scores instead of cross-entropy, reads the first
token of the transformer layer instead of the mean, and masks real tokens instead of padding. States are brought to mean
0 and variance 1 before the critic, because those of decoders have lengths in the hundreds.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from hl_scale.base import AdaptedModel
from hl_scale.objectives.alignment import EmptyCloudError

SentenceState = Literal["first", "last"]
_MOST_HEADS = 12


def sentence_state_of(base: AdaptedModel) -> SentenceState:
    """Which token stands for a sentence: the first of an encoder, the last of a decoder.

    An encoder's first token (CLS) attends to all others and is what its classifiers read. In a decoder it sees nothing
    and is the same for every text; the last token is the only one that has seen the whole sentence, and what
    classifiers on decoders read.
    """
    return "last" if base.has_head else "first"


class TadaObjective(nn.Module):
    """Alignment of sentence states against a critic; holds the critic's parameters, which are trained too.

    Args:
        hidden_size: D.
        sentence_state: see `sentence_state_of`.
        adversary_weight: of the critic's reversed gradients, 1 / D unless given; 0 leaves alignment alone.
    """

    def __init__(self, hidden_size: int, sentence_state: SentenceState, adversary_weight: float | None = None) -> None:
        super().__init__()
        adversary_weight = 1 / hidden_size if adversary_weight is None else adversary_weight
        if adversary_weight < 0:
            raise ValueError(f"adversary_weight = {adversary_weight}\n  fix: give a number that is not negative")
        self.sentence_state = sentence_state
        self.adversary_weight = adversary_weight
        heads = next(count for count in range(_MOST_HEADS, 0, -1) if hidden_size % count == 0)
        self.tokens = nn.TransformerEncoderLayer(hidden_size, heads, dropout=0.0, batch_first=True)
        self.score = nn.Sequential(
            nn.Linear(hidden_size, max(hidden_size // 2, 1)), nn.ReLU(), nn.Linear(max(hidden_size // 2, 1), 1)
        )

    def forward(
        self, dialect: Tensor, dialect_mask: Tensor, standard: Tensor, standard_mask: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch of pairs, and metrics as plain floats.

        Args:
            dialect: (B, T, D) states of the adapted base on dialect sentences, any floating dtype.
            dialect_mask: (B, T), non-zero for real tokens.
            standard: (B, M, D) states of the bare base on their originals; no gradient flows to them.
            standard_mask: (B, M).

        Returns:
            Scalar float32 loss, and ``tada_alignment`` (mean square of differences), ``tada_critic`` (cross-entropy,
            0.69 where it tells nothing apart) and ``tada_critic_accuracy``.

        Raises:
            EmptyCloudError: a row without tokens.
        """
        standard = standard.detach()
        difference = sentence_states(dialect, dialect_mask, self.sentence_state) - sentence_states(
            standard, standard_mask, self.sentence_state
        )
        alignment = difference.square().mean()
        of_dialect = self.critic(reverse_gradient(dialect, self.adversary_weight), dialect_mask)
        scores = torch.cat((of_dialect, self.critic(standard, standard_mask)))
        truth = torch.cat((torch.ones_like(of_dialect), torch.zeros(len(scores) - len(of_dialect)).to(scores)))
        critic = nn.functional.binary_cross_entropy_with_logits(scores, truth)
        return alignment + critic, {
            "tada_alignment": alignment.item(),
            "tada_critic": critic.item(),
            "tada_critic_accuracy": ((scores > 0) == (truth > 0)).float().mean().item(),
        }

    def critic(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B,) log-odds that token states (B, T, D) are of dialect text."""
        states = nn.functional.layer_norm(hidden.to(next(self.parameters()).dtype), hidden.shape[-1:])
        real = mask.bool()
        read = self.tokens(states, src_key_padding_mask=~real)
        mean = (read * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return self.score(mean)[:, 0]


def sentence_states(hidden: Tensor, mask: Tensor, which: SentenceState) -> Tensor:
    """(B, D) float32 state of the first or last real token of each row, padding on either side.

    Raises:
        EmptyCloudError: a row without tokens.
    """
    real = mask.bool()
    empty = (~real.any(-1)).nonzero()[:, 0].tolist()
    if empty:
        raise EmptyCloudError(
            f"row {', '.join(map(str, empty))} of {len(mask)} has no token\n  fix: remove empty sentences from the data"
        )
    tokens = torch.arange(mask.shape[1], device=mask.device)
    at = real.int().argmax(-1) if which == "first" else (real * tokens).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), at].float()


def reverse_gradient(x: Tensor, weight: float = 1.0) -> Tensor:
    """x itself, whose gradient in backward is multiplied by -weight (Ganin and Lempitsky 2015, arXiv 1409.7495)."""
    return _Reversed.apply(x, weight)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None
