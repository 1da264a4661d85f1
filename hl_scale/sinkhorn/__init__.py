"""Sinkhorn divergence between weighted point clouds."""

from hl_scale.sinkhorn.divergence import SinkhornInfo, sinkhorn_divergence

__all__ = ["SinkhornInfo", "sinkhorn_divergence"]
