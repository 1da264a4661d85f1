"""Generated adapters for other engines: PEFT directories, checks, merged checkpoints, GGUF.

Names are imported when they are used: `validation` runs inside servers, where most of this package's needs are missing.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "ExportError": "export",
    "generate_adapter": "export",
    "write_peft_adapter": "export",
    "MergedCheckpoint": "merge",
    "merge_adapter": "merge",
    "OutputError": "staging",
    "AdapterError": "validation",
    "validate_adapter": "validation",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
