"""Training objectives: from hidden states or logits to a scalar loss and metrics."""

from hl_scale.objectives.alignment import AlignmentObjective, EmptyCloudError

__all__ = ["AlignmentObjective", "EmptyCloudError"]
