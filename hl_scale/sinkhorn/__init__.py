"""Sinkhorn divergence between weighted point clouds."""

from hl_scale.sinkhorn.definition import naive_sinkhorn_divergence
from hl_scale.sinkhorn.divergence import SinkhornInfo, sinkhorn_divergence
from hl_scale.sinkhorn.packed import packed_sinkhorn_divergence
from hl_scale.sinkhorn.sharded import sharded_sinkhorn_divergence

__all__ = [
    "SinkhornInfo",
    "naive_sinkhorn_divergence",
    "packed_sinkhorn_divergence",
    "sharded_sinkhorn_divergence",
    "sinkhorn_divergence",
]
