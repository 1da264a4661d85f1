"""Model cards: what a directory of weights says about itself to a reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def adapter_card(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """README.md of a PEFT directory.

    Args:
        config: content of its adapter_config.json.
        facts: its provenance.
    """
    base = config["base_model_name_or_path"]
    quantization = facts.get("base_quantization", "none")
    held = "" if quantization == "none" else f" with its linear layers held in {quantization}"
    auto = "AutoModelForCausalLM" if config["task_type"] == "CAUSAL_LM" else "AutoModel"
    origin = (
        "that an hl_scale hypernetwork generated from a condition, in one forward pass.\nThe hypernetwork was trained"
    )
    if facts.get("hypernetwork") == "plain_lora":
        origin = "for all conditions alike, trained by hl_scale"
    if "shared_basis_rank" in facts:
        origin = (
            f"restored from bases of rank {facts['shared_basis_rank']} that it shared with "
            f"{facts['shared_basis_adapters'] - 1} others (relative error of\nits updates "
            f"{facts['shared_basis_error']:.2g}); the original was trained"
        )
    elif "task" in facts:
        origin = f"for the task {facts['task']} alone, trained by hl_scale"
    added = facts.get("task_adapter")
    title = facts.get("condition", "one condition")
    sum_of_both = "" if added is None else f"\nTo it the trained adapter {added} was added, in the same layers."
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags: [lora, hypernetwork, hl_scale]
---

# Adapter for {title if added is None else f"{title}, with {added}"}

A LoRA adapter (rank {config["r"]}, scale {facts["scale"]:g}) {origin}
on the base below{held}; on weights in another precision the adapter's effect differs a
little.{sum_of_both}

```python
from peft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained({json.dumps(base, ensure_ascii=False)})
model = PeftModel.from_pretrained(model, "THIS DIRECTORY")
```

{facts_table(facts)}
"""


def facts_table(facts: Mapping[str, Any]) -> str:
    """The scalar facts of a provenance record as a Markdown table."""
    rows = [f"| {key} | {value} |" for key, value in facts.items() if not isinstance(value, dict | list)]
    return "\n".join(["| fact | value |", "| --- | --- |", *rows])
