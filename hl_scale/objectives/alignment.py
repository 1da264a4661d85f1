"""The alignment objective: token clouds of a dialect sentence and of its standard original are brought together.

For each pair the loss is the Sinkhorn divergence S(x, y) between the hidden states x of the adapted model on the
dialect sentence and the frozen base's states y of the standard sentence (mean over pairs, not over tokens). Tokens
have equal weights in their cloud.

Normalisation matters, because the divergence scales with the squared length of the states while blur does not:

- ``none``: states after the final norm as they are. Their squared length is in the thousands (|x| is about 101 for
  Gemma 3 270M, D = 640; a dialect pair is at about 1000): gradients are large, and rounding of bf16 states shows.
- ``l2``: each token on the unit sphere. Lengths are lost; pairs are at about 0.1, not far above the default
  epsilon 0.0025, so that the value depends on blur (-8% from blur 0.05 to 0.224).
- ``sqrt_dim`` (default): x / sqrt(D). Pairs are at about 1.6, random pairs at 7.5, bf16 noise at 0.002, and the value
  moves by less than 1% for any blur from 0.001 to 0.5: lengths and directions count, and blur needs no tuning.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from hl_scale.sinkhorn import sinkhorn_divergence

if TYPE_CHECKING:
    from hl_scale.config import AlignmentConfig


class EmptyCloudError(ValueError):
    """A sample has no token left to align."""


class AlignmentObjective:
    """Mean Sinkhorn divergence between hidden states and targets; see the module for normalisations.

    Args:
        config: section ``objective``.

    Raises:
        ValueError: ``objective.solver`` is geomloss and it is not installed.
    """

    def __init__(self, config: AlignmentConfig) -> None:
        self.config = config
        self._schedule: dict[str, Any] = {
            "blur": config.blur,
            "scaling": config.scaling,
            "diameter": config.diameter,
        }
        self._geomloss = _geomloss_loss(config) if config.solver == "geomloss" else None

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scale hidden states (B, T, D) of any floating dtype as ``objective.normalization`` says.

        Returns:
            (B, T, D) float32 (float64 for float64 input). The states are upcast before anything is computed.
        """
        if hidden.dtype != torch.float64:
            hidden = hidden.float()
        if self.config.normalization == "sqrt_dim":
            return hidden / math.sqrt(hidden.shape[-1])
        if self.config.normalization == "l2":
            return torch.nn.functional.normalize(hidden, dim=-1)
        return hidden

    def token_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Tokens that belong to the cloud: (B, T) bool from an attention mask (B, T), padding on either side.

        With ``objective.skip_first_token`` the first real token (BOS or CLS) is left out: in a causal model its state
        is the same for every text, so it only dilutes the divergence.
        """
        mask = attention_mask.bool()
        if not self.config.skip_first_token:
            return mask
        return mask & (mask.cumsum(-1) > 1)

    def divergence(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor,
        target: torch.Tensor,
        target_mask: torch.Tensor,
        target_self: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Divergence of each sample; independent of padding and of the other samples.

        Args:
            hidden: (B, T, D) raw hidden states after the final norm, any floating dtype.
            attention_mask: (B, T), non-zero for real tokens, the first one included.
            target: (B, M, D) states that `normalize` and `token_mask` have been applied to already, padded.
            target_mask: (B, M) bool.
            target_self: (B,) from `self_terms` of the targets, where they are known.

        Returns:
            (B,) float32, differentiable in `hidden`; no gradient flows to `target`.

        Raises:
            EmptyCloudError: a row has no token left in `hidden` or in `target`.
            ValueError: states that are not finite, or shapes that do not fit.
        """
        x, x_mask = self.normalize(hidden), self.token_mask(attention_mask)
        y, y_mask = target.detach().to(x.dtype), target_mask.bool()
        self._refuse_empty(x_mask, "hidden states", "attention_mask")
        self._refuse_empty(y_mask, "target", "target_mask")
        if self._geomloss is not None:
            return self._pair_by_pair(x, x_mask, y, y_mask)
        return sinkhorn_divergence(x, y, x_mask=x_mask, y_mask=y_mask, y_self=target_self, **self._schedule)

    def self_terms(self, target: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor | None:
        """(B,) self terms of targets (B, M, D) that do not depend on what is aligned with them.

        None where they do: without ``objective.diameter``, and under the geomloss solver.
        """
        if self.config.diameter is None or self._geomloss is not None:
            return None
        y, mask = target.detach(), target_mask.bool()
        with torch.no_grad():
            return 0.5 * sinkhorn_divergence(y, y, x_mask=mask, y_mask=mask, debias=False, **self._schedule)

    def __call__(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor,
        target: torch.Tensor,
        target_mask: torch.Tensor,
        target_self: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean divergence over the samples, and metrics as plain floats; arguments as for `divergence`.

        Metrics: ``alignment_loss`` (the mean), ``alignment_max`` (worst sample), ``mean_tokens`` and
        ``mean_target_tokens`` (points per cloud).
        """
        values = self.divergence(hidden, attention_mask, target, target_mask, target_self)
        loss = values.mean()
        tokens = self.token_mask(attention_mask).sum(-1).double().mean()
        metrics = {
            "alignment_loss": loss.item(),
            "alignment_max": values.max().item(),
            "mean_tokens": tokens.item(),
            "mean_target_tokens": target_mask.bool().sum(-1).double().mean().item(),
        }
        return loss, metrics

    def _refuse_empty(self, mask: torch.Tensor, what: str, argument: str) -> None:
        empty = (~mask.any(-1)).nonzero()[:, 0].tolist()
        if not empty:
            return
        skipped = ", after its first token was left out (objective.skip_first_token)"
        note = skipped if self.config.skip_first_token and argument == "attention_mask" else ""
        raise EmptyCloudError(
            f"no token left in the {what} of row {', '.join(map(str, empty))} of {len(mask)}{note}: expected at least "
            f"one in each row of {argument}; remove the empty sentence from the data"
        )

    def _pair_by_pair(
        self, x: torch.Tensor, x_mask: torch.Tensor, y: torch.Tensor, y_mask: torch.Tensor
    ) -> torch.Tensor:
        """GeomLoss on one pair at a time: on a batch it would take one schedule for all samples and their padding."""
        assert self._geomloss is not None
        enabled = torch.is_grad_enabled()
        values = []
        try:
            for row in range(len(x)):
                ours, theirs = x[row][x_mask[row]], y[row][y_mask[row]]
                if bool((ours == theirs[:1]).all()) and bool((theirs == theirs[:1]).all()):
                    # All in one point: 0 with gradient 0 by definition, where GeomLoss fails on a diameter of 0.
                    values.append((ours * 0).sum())
                    continue
                values.append(self._geomloss(ours, theirs))
                # GeomLoss switches autograd on and leaves it so.
                torch.set_grad_enabled(enabled)
        finally:
            torch.set_grad_enabled(enabled)
        return torch.stack(values)


def _geomloss_loss(config: AlignmentConfig) -> torch.nn.Module:
    try:
        from geomloss import SamplesLoss
    except ImportError as error:
        raise ValueError(
            "objective.solver is 'geomloss', which is not installed: pip install geomloss, or choose the native solver"
        ) from error
    loss: torch.nn.Module = SamplesLoss(
        "sinkhorn", p=2, blur=config.blur, scaling=config.scaling, diameter=config.diameter, backend="tensorized"
    )
    return loss
