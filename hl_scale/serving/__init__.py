"""Generated adapters for other engines: PEFT directories, checks, merged checkpoints, GGUF.

Names are imported when they are used: `validate_adapter` runs inside servers, where most of this package's needs are
missing.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "ExportError": "hl_scale.serving.export",
    "generate_adapter": "hl_scale.serving.export",
    "write_peft_adapter": "hl_scale.serving.export",
    "MergedCheckpoint": "hl_scale.serving.merge",
    "merge_adapter": "hl_scale.serving.merge",
    "OutputError": "hl_scale.serving.staging",
    "AdapterError": "hl_scale.data.validation",
    "validate_adapter": "hl_scale.data.validation",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
