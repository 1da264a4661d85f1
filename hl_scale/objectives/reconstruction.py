"""The reconstruction objective: generated factors approach those of trained LoRAs, and the base is not run.

- ``delta`` (default): |s B A - s* B* A*|^2 over all slots, divided by the library's mean |s* B* A*|^2, so that
  predicting no update costs about 1. It sees updates alone: any factors with the right product are right.
- ``factors``: mean absolute error of A and of B. Trained factors are determined only up to (B M, M^-1 A), so that
  unlike ones may stand for one update: targets are best in singular form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hl_scale.lora import LoraFactors
from hl_scale.lora_algebra import delta_distance, delta_inner

if TYPE_CHECKING:
    from hl_scale.config import ReconstructionConfig
    from hl_scale.data.library import LibraryStatistics

_LEAST_SPREAD = 1e-3
"""Of a tensor's root mean square deviation, added to that of each entry: one that hardly varies must not dominate."""


class ReconstructionObjective:
    """Distance between generated factors and a library's; see the module.

    Args:
        config: section ``objective``.
        statistics: of the library's adapters of the training tasks, in singular form if ``objective.canonical``.
        device: where factors will be.

    Raises:
        ValueError: the statistics cannot normalise: no update at all, or entries without spread.
    """

    def __init__(
        self, config: ReconstructionConfig, statistics: LibraryStatistics, device: torch.device | str = "cpu"
    ) -> None:
        self.config = config
        self.mean_square_norm = statistics.mean_square_norm
        self._spread: dict[str, tuple[Tensor, Tensor]] = {}
        if config.targets == "delta" and not self.mean_square_norm > 0:
            raise ValueError(
                f"the adapters of {config.library} change nothing: all their updates are zero\n"
                "  fix: correct objective.library; these were not trained"
            )
        if config.targets == "factors" and config.z_score:
            std = statistics.std
            for slot in std.slots:
                a, b = (_spread(side[slot.path][0], slot.path, config.library) for side in (std.a, std.b))
                self._spread[slot.path] = a.to(device), b.to(device)

    def __call__(self, generated: LoraFactors, target: LoraFactors) -> Tensor:
        """Loss of each condition.

        Args:
            generated: A (E, r, in) and B (E, out, r) of each slot.
            target: the library's, for the same conditions and slots; of another rank perhaps, where updates count.

        Returns:
            (E,) float32, differentiable in `generated`.

        Raises:
            ValueError: conditions or slots that do not fit; for ``factors``, another rank or scale.
        """
        self._check(generated, target)
        values = []
        for slot in generated.slots:
            path = slot.path
            factors = generated.a[path], generated.b[path], target.a[path], target.b[path]
            if self.config.targets == "delta":
                distance = delta_distance(*factors, generated.scale, target.scale)
                values.append(distance * (len(generated.slots) / self.mean_square_norm))
            else:
                values.append(factor_error(*factors, self._spread.get(path)))
        return torch.stack(values).mean(0).float()

    @torch.no_grad()
    def metrics(self, generated: LoraFactors, target: LoraFactors) -> dict[str, float]:
        """How near the updates of all slots are, whatever the loss is.

        Returns:
            ``delta_relative_error``: sum of |dW - dW*|^2 over sum of |dW*|^2, 1 for no update, and ``delta_cosine``:
            cosine between dW and dW*, mean over conditions, 0 where one of them is zero.
        """
        self._check(generated, target)
        own, cross, wanted = _inner(generated, generated), _inner(generated, target), _inner(target, target)
        distance = (own - 2 * cross + wanted).clamp(min=0)
        tiny = torch.finfo(torch.float64).tiny
        return {
            "delta_relative_error": float(distance.sum() / wanted.sum().clamp(min=tiny)),
            "delta_cosine": float((cross / (own * wanted).clamp(min=tiny).sqrt()).mean()),
        }

    def _check(self, generated: LoraFactors, target: LoraFactors) -> None:
        ours, theirs = ({slot.path for slot in factors.slots} for factors in (generated, target))
        if ours != theirs or generated.conditions != target.conditions:
            raise ValueError(
                f"{generated.conditions} conditions in {len(ours)} slots against targets of {target.conditions} in "
                f"{len(theirs)}, of which {len(ours & theirs)} are the same; expected all"
            )
        if self.config.targets == "delta":
            return
        if generated.rank != target.rank or abs(generated.scale - target.scale) > 1e-6 * abs(target.scale):
            raise ValueError(
                f"the library has rank {target.rank} and scale {target.scale:g}, generated factors have rank "
                f"{generated.rank} and scale {generated.scale:g}, so A and B cannot be compared\n  fix: set lora.rank, "
                "lora.alpha and lora.scale_convention as the library has them, or objective.targets = delta"
            )


def factor_error(
    a: Tensor, b: Tensor, a_target: Tensor, b_target: Tensor, spread: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Mean absolute error of A and of B, half each.

    Args:
        a, a_target: (E, r, in).
        b, b_target: (E, out, r).
        spread: what the errors of A (r, in) and of B (out, r) are divided by, which makes them errors of z-scores
            (the means cancel); None for the factors as they are.

    Returns:
        (E,) in the wider of both types; a library's is float32.
    """
    errors = [(a - a_target).abs(), (b - b_target).abs()]
    if spread is not None:
        errors = [error / by.to(error) for error, by in zip(errors, spread, strict=True)]
    return 0.5 * (errors[0].mean((1, 2)) + errors[1].mean((1, 2)))


def _inner(first: LoraFactors, second: LoraFactors) -> Tensor:
    """(E,) float64 inner product of the updates of all slots."""
    parts = [delta_inner(first.a[s.path], first.b[s.path], second.a[s.path], second.b[s.path]) for s in first.slots]
    return first.scale * second.scale * torch.stack(parts).sum(0)


def _spread(std: Tensor, path: str, library: str) -> Tensor:
    typical = std.square().mean().sqrt()
    if not typical > 0:
        raise ValueError(
            f"the adapters of {library} have the same factors in {path}, so there is no spread to normalise by\n"
            "  fix: set objective.z_score = false, or objective.targets = delta"
        )
    return std + _LEAST_SPREAD * typical
