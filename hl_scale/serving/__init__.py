"""Generated adapters for other engines: PEFT directories and merged checkpoints."""

from hl_scale.serving.export import ExportError, generate_adapter, write_peft_adapter
from hl_scale.serving.merge import MergedCheckpoint, merge_adapter
from hl_scale.serving.staging import OutputError

__all__ = ["ExportError", "MergedCheckpoint", "OutputError", "generate_adapter", "merge_adapter", "write_peft_adapter"]
