"""The frozen base model: loading, 4-bit linear layers, and the slots that receive generated adapters."""

from hl_scale.base.adapted import AdaptedModel, BaseModelError
from hl_scale.base.loading import adapt_model, load_base
from hl_scale.base.quantized_linear import AdaptableLinear, FrozenLinear, QuantizedLinear
from hl_scale.base.task_adapter import TaskAdapter, read_task_adapter

__all__ = [
    "AdaptableLinear",
    "AdaptedModel",
    "BaseModelError",
    "FrozenLinear",
    "QuantizedLinear",
    "TaskAdapter",
    "adapt_model",
    "load_base",
    "read_task_adapter",
]
