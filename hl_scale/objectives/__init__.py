"""Training objectives: from hidden states, logits or factors to a scalar loss and metrics."""

from hl_scale.objectives.alignment import AlignmentObjective, EmptyCloudError
from hl_scale.objectives.reconstruction import ReconstructionObjective
from hl_scale.objectives.supervised import (
    EmptyAnswerError,
    ResponseLoss,
    neftune_noise,
    unfamiliar_penalty,
    weight_penalty,
)
from hl_scale.objectives.tada import TadaObjective, reverse_gradient, sentence_state_of

__all__ = [
    "AlignmentObjective",
    "EmptyAnswerError",
    "EmptyCloudError",
    "ReconstructionObjective",
    "ResponseLoss",
    "TadaObjective",
    "neftune_noise",
    "reverse_gradient",
    "sentence_state_of",
    "unfamiliar_penalty",
    "weight_penalty",
]
