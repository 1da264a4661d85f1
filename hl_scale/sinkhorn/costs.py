"""Costs between two clouds in tiles, within a memory budget, and what Sinkhorn's algorithm reads from them.

As many tiles as the budget holds are kept from pass to pass; the others are computed again. Where float32 tiles do not
all fit, tiles are kept in 16 bits instead, as whole multiples of a step between the smallest and the largest cost of
the tile, provided that rounding to them moves no cost by more than a tenth of epsilon (half-precision floats would:
their rounding grows with the cost). A tile that spans too much for that is kept in float32 while there is room.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hl_scale.kernels.softmin import plan_, plan_sums
from hl_scale.sinkhorn.softmin import LOG_2, exponentiate_

# Edge of a tile: on CPUs it should stay in the second-level cache, on GPUs fill the device.
_CPU_EDGE, _CUDA_EDGE = 1024, 4096
# Tensors of the size of a tile that are alive at once: costs and exponents; on CUDA also products of 16-bit points.
_TILE_TENSORS, _CUDA_TILE_TENSORS = 2, 4
# What tiles at work may take of a budget; the rest keeps costs.
_WORK_SHARE = 0.25
# Rounding of kept costs, in units of epsilon.
_CACHE_ERROR = 0.1
# A marginal below this share of its weight, or below this number an entry, may have lost plan entries to underflow or
# consist of cut-off ones.
_SMALLEST_SHARE, _SMALLEST_ENTRY = 2.0**-60, 2.0**-100


@dataclass(frozen=True)
class Budget:
    """Edge of a tile, and bytes left for tiles that are kept."""

    edge: int
    cache_bytes: float


def divide_budget(memory_budget: int | None, like: torch.Tensor) -> Budget:
    """Tile edge and cache for `memory_budget` bytes of intermediate results in the dtype of `like`; None: no limit.

    Raises:
        ValueError: the budget does not hold one cost.
    """
    edge, tensors = (_CUDA_EDGE, _CUDA_TILE_TENSORS) if like.is_cuda else (_CPU_EDGE, _TILE_TENSORS)
    if memory_budget is None:
        return Budget(edge, math.inf)
    numbers = memory_budget // like.element_size()
    if numbers < tensors:
        raise ValueError(
            f"memory_budget is {memory_budget} bytes, but one cost takes {tensors * like.element_size()}: "
            "raise it, or pass None"
        )
    edge = min(edge, max(1, math.isqrt(int(numbers * _WORK_SHARE) // tensors)))
    return Budget(edge, memory_budget - tensors * edge * edge * like.element_size())


class Cloud:
    """One cloud of a pair without padding.

    Attributes:
        inside: mask of the cloud in its padded row; whole: it has no padding.
        points: (N, D) of any floating dtype; products are computed in the dtype of the weights.
        weights: (N,) float32 or float64; log_weights (base 2), half_norms: (N,), same dtype.
    """

    def __init__(self, points: torch.Tensor, weights: torch.Tensor) -> None:
        self.inside = weights > 0
        self.whole = bool(self.inside.all())
        self.points, self.weights = (points, weights) if self.whole else (points[self.inside], weights[self.inside])
        self.log_weights = self.weights.log2()
        self.half_norms = _half_norms(self.points, self.weights.dtype)

    def logits(self, potential: torch.Tensor, inverse: float) -> torch.Tensor:
        """(N,) logarithms of weights * exp(potential / epsilon) to base 2; `inverse` is 1 / (epsilon log 2)."""
        return torch.add(self.log_weights, potential, alpha=inverse)

    def drift(self, change: torch.Tensor, epsilon: float) -> torch.Tensor:
        """() L1 distance of this cloud's marginal from its weights, for potentials `change` above a full update."""
        return self.weights @ (change / epsilon).expm1().abs()


@dataclass(frozen=True)
class Tile:
    """Some rows and columns: offset + step * costs, where costs (rows, columns) are int16 or the weights' dtype."""

    rows: slice
    columns: slice
    costs: torch.Tensor
    step: float = 1.0
    offset: float = 0.0


class Costs:
    """Costs 0.5*|x_i - y_j|^2 between two clouds, or within one.

    Within one cloud only tiles on and above the diagonal exist; those above stand for their mirror images too.

    Args:
        x, y: the clouds; the same object for costs within one.
        budget: what `divide_budget` returned.
        epsilon: the smallest temperature that the costs will be used at.
    """

    def __init__(self, x: Cloud, y: Cloud, budget: Budget, epsilon: float) -> None:
        self.x, self.y, self.symmetric = x, y, x is y
        self.edge = min(budget.edge, max(len(x.weights), len(y.weights)))
        self.work = x.weights.new_empty(_TILE_TENSORS, self.edge * self.edge)
        self.room, self.epsilon = budget.cache_bytes, epsilon
        self.kept: dict[tuple[int, int], Tile] = {}
        numbers = sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in self._places())
        self.compact = x.weights.dtype == torch.float32 and numbers * self.work.element_size() > self.room

    def _places(self) -> Iterator[tuple[slice, slice]]:
        for start in range(0, len(self.x.weights), self.edge):
            rows = slice(start, min(start + self.edge, len(self.x.weights)))
            for left in range(start if self.symmetric else 0, len(self.y.weights), self.edge):
                yield rows, slice(left, min(left + self.edge, len(self.y.weights)))

    def __iter__(self) -> Iterator[Tile]:
        """Every tile; its costs hold until the next one and must not be changed."""
        for rows, columns in self._places():
            yield self.kept.get((rows.start, columns.start)) or self._tile(rows, columns)

    def _tile(self, rows: slice, columns: slice) -> Tile:
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        size = (2 if self.compact else self.work.element_size()) * shape[0] * shape[1]
        keep = size <= self.room
        costs = self.work.new_empty(shape) if keep and not self.compact else self._scratch(0, shape)
        torch.add(self.x.half_norms[rows, None], self.y.half_norms[columns], out=costs)
        _subtract_products(costs, self.x.points[rows], self.y.points[columns])
        tile = Tile(rows, columns, costs)
        if keep and self.compact:
            compact = _compact(tile, self.epsilon)
            if compact is None:
                size *= 2
                keep = size <= self.room
                tile = Tile(rows, columns, costs.clone()) if keep else tile
            else:
                tile = compact
        if keep:
            self.room -= size
            self.kept[rows.start, columns.start] = tile
        return tile

    def _scratch(self, number: int, shape: tuple[int, ...]) -> torch.Tensor:
        return self.work[number, : math.prod(shape)].view(shape)

    def softmin(
        self, f: torch.Tensor, g: torch.Tensor, epsilon: float, on_x: bool = True, on_y: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Full updates: softmin over columns (on x, given g) and over rows (on y, given f).

        Within one cloud both are one result. One exponential per cost gives both, from the marginals of the plan that
        f and g stand for; where that plan leaves the range of the dtype, they are computed from maxima. A side that is
        not asked for may come back as anything.
        """
        inverse = 1 / (epsilon * LOG_2)
        row_logits, column_logits = self.x.logits(f, inverse), self.y.logits(g, inverse)
        marginal_x = torch.zeros_like(f)
        marginal_y = marginal_x if self.symmetric else torch.zeros_like(g)
        for tile in self:
            along, down = plan_sums(
                tile.costs,
                row_logits[tile.rows] - tile.offset * inverse,
                column_logits[tile.columns],
                tile.step * inverse,
                self._scratch(1, tile.costs.shape),
            )
            marginal_x[tile.rows] += along
            if not (self.symmetric and tile.rows == tile.columns):
                marginal_y[tile.columns] += down
        shares = marginal_x / self.x.weights, marginal_y / self.y.weights
        for share, marginal, count, asked in (
            (shares[0], marginal_x, len(marginal_y), on_x),
            (shares[1], marginal_y, len(marginal_x), on_y),
        ):
            sound = share.isfinite() & (share > _SMALLEST_SHARE) & (marginal > count * _SMALLEST_ENTRY)
            if asked and not bool(sound.all()):
                return self._softmin_from_maxima(row_logits, column_logits, inverse)
        new_f = f - epsilon * shares[0].log()
        return new_f, new_f if self.symmetric else g - epsilon * shares[1].log()

    def _softmin_from_maxima(
        self, row_logits: torch.Tensor, column_logits: torch.Tensor, inverse: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new_f = torch.full_like(row_logits, -torch.inf)
        new_g = new_f if self.symmetric else torch.full_like(column_logits, -torch.inf)
        for tile in self:
            work = self._scratch(1, tile.costs.shape)
            torch.add(column_logits[tile.columns], tile.costs, alpha=-tile.step * inverse, out=work)
            along = exponentiate_(work)[0] - tile.offset * inverse
            new_f[tile.rows] = torch.logaddexp2(new_f[tile.rows], along)
            if not (self.symmetric and tile.rows == tile.columns):
                torch.add(row_logits[tile.rows, None], tile.costs, alpha=-tile.step * inverse, out=work)
                down = exponentiate_(work, 0)[0] - tile.offset * inverse
                new_g[tile.columns] = torch.logaddexp2(new_g[tile.columns], down)
        new_f.div_(-inverse)
        return new_f, new_f if self.symmetric else new_g.div_(-inverse)

    def barycentres(
        self, final: Potentials, epsilon: float, out: torch.Tensor | None = None, *, transposed: bool = False
    ) -> torch.Tensor:
        """sum_j P_ij y_j (N, D), for P whose rows sum to 1; transposed, sum_i P_ji x_i (M, D). `out` holds zeros."""
        moved, sums = self.transported(final, epsilon, out, transposed=transposed)
        return moved.div_(sums[:, None])  # 1 up to rounding

    def transported(
        self, final: Potentials, epsilon: float, out: torch.Tensor | None = None, *, transposed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sum_j P_ij y_j (N, D) and sum_j P_ij (N,) with P_ij = b_j exp((f_i + g_j - C_ij) / epsilon).

        Transposed: sum_i P_ji x_i (M, D) and sum_i P_ji (M,), for the potentials of y.
        """
        inverse = 1 / (epsilon * LOG_2)
        ours, others = (self.y, self.x) if transposed else (self.x, self.y)
        own_logits, logits = final.own * inverse, others.logits(final.previous_of_other, inverse)
        moved = ours.weights.new_zeros(ours.points.shape) if out is None else out
        sums = torch.zeros_like(ours.weights)
        for tile in self:
            rows, columns, work = tile.rows, tile.columns, self._scratch(1, tile.costs.shape)
            step, offset = tile.step * inverse, tile.offset * inverse
            if not transposed:
                plan = plan_(tile.costs, own_logits[rows] - offset, logits[columns], step, work)
                _add_products(moved[rows], plan, self.y.points[columns])
                sums[rows] += plan.sum(1)
            if transposed or (self.symmetric and rows != columns):
                plan = plan_(tile.costs, logits[rows] - offset, own_logits[columns], step, work)
                _add_products(moved[columns], plan.T, self.x.points[rows])
                sums[columns] += plan.sum(0)
        return moved, sums


@dataclass(frozen=True)
class Potentials:
    """Final potential of a cloud, and its partner's before the last update: together they make the plan."""

    own: torch.Tensor
    previous_of_other: torch.Tensor


def _compact(tile: Tile, epsilon: float) -> Tile | None:
    """The tile in 16 bits (its costs are overwritten), or None where that would move costs by too much."""
    low, high = (float(bound) for bound in torch.aminmax(tile.costs))
    step = max(high - low, torch.finfo(torch.float32).tiny) / 65535
    if step / 2 > _CACHE_ERROR * epsilon:
        return None
    whole = tile.costs.sub_(low).div_(step).round_().sub_(32768)
    return Tile(tile.rows, tile.columns, whole.to(torch.int16), step, low + 32768 * step)


def _half_norms(points: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if points.dtype == dtype:
        return torch.linalg.vector_norm(points, dim=-1).square_().div_(2)  # no tensor of the size of the points
    return torch.cat([part.to(dtype).square_().sum(-1).div_(2) for part in points.split(4096)])


def _subtract_products(costs: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """costs -= x y^T. Products of 16-bit values are exact in float32, on tensor cores too."""
    if x.dtype == costs.dtype or not x.is_cuda:
        costs.addmm_(x.to(costs.dtype), y.to(costs.dtype).T, alpha=-1)
    else:
        costs.sub_(torch.mm(x, y.T, out_dtype=costs.dtype))


def _add_products(out: torch.Tensor, plan: torch.Tensor, points: torch.Tensor) -> None:
    """out += plan @ points. On CUDA the plan goes into bfloat16 products as two halves, good to 16 bits."""
    if points.dtype == torch.bfloat16 and points.is_cuda:
        high = plan.to(points.dtype)
        for part in (high, (plan - high).to(points.dtype)):
            out.add_(torch.mm(part, points, out_dtype=out.dtype))
    else:
        out.addmm_(plan, points.to(out.dtype))
