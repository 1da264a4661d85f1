"""Frozen targets: the base's own states of each standard sentence, computed once and kept on disk.

Keyed by fingerprints of model and task adapter, normalisation and text, so they are shared by runs and never mixed up
between bases.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hl_scale.base import AdaptedModel, TaskAdapter
from hl_scale.engine import zero3
from hl_scale.engine.zero3 import World
from hl_scale.objectives.alignment import AlignmentObjective

TEXTS_PER_CHUNK = 128
TEXTS_PER_PASS = 16
CLOUDS_IN_MEMORY = 4096


class TargetCache:
    """Token clouds of standard sentences.

    Args:
        directory: parent directory; one sub-directory per (base, task adapter, normalisation).
        base: the frozen base.
        objective: normalisation and token mask.
        task_adapter: what the base carries where states are computed, if anything.
    """

    def __init__(
        self,
        directory: Path,
        base: AdaptedModel,
        objective: AlignmentObjective,
        task_adapter: TaskAdapter | None = None,
    ) -> None:
        key = f"{base.fingerprint}|{objective.config.normalization}|{objective.config.skip_first_token}"
        key += "" if task_adapter is None else f"|{task_adapter.fingerprint}"
        self.directory = directory / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.base = base
        self.factors = None if task_adapter is None else task_adapter.factors
        self.objective = objective
        self._found: dict[str, Path] = {}
        self._read = lru_cache(maxsize=CLOUDS_IN_MEMORY)(self._load)
        self._self_terms: dict[str, Tensor] = {}

    def prepare(self, texts: Sequence[str], world: World, report: Callable[[int, int], None] | None = None) -> None:
        """Compute what is missing, the chunks shared out over the ranks; collective.

        Args:
            texts: standard sentences, repeats allowed.
            world: this process.
            report: called with (chunks done, chunks in all) of this rank.
        """
        with zero3.together(world):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._scan()
        missing = sorted({text for text in texts if text_key(text) not in self._found}, key=text_key)
        # Runs on the same corpus share the directory, so ranks may see it at different moments.
        missing = zero3.gather_objects(missing, world)[0]
        chunks = [missing[i : i + TEXTS_PER_CHUNK] for i in range(0, len(missing), TEXTS_PER_CHUNK)]
        mine = chunks[world.rank :: world.size]
        with zero3.together(world):
            for done, chunk in enumerate(mine):
                if report is not None:
                    report(done, len(mine))
                self._write(chunk, world.device)
        with zero3.together(world):
            self._scan()
            lost = [text for text in texts if text_key(text) not in self._found]
            if lost:
                raise OSError(
                    f"frozen targets of {len(lost)} sentences are not in {self.directory}: something removes or "
                    "damages files there\n  fix: run the same command again; they are computed anew"
                )

    def get(self, text: str) -> Tensor:
        """(M, D) normalised states without the tokens the objective leaves out; float32."""
        return self._read(text_key(text)).float()

    def self_term(self, text: str) -> Tensor | None:
        """(1,) self term of the text's cloud, computed on first use; None where `objective` has none beforehand."""
        key = text_key(text)
        if key not in self._self_terms:
            cloud = self.get(text)[None]
            term = self.objective.self_terms(cloud, torch.ones(cloud.shape[:2], dtype=torch.bool))
            if term is None:
                return None
            self._self_terms[key] = term
        return self._self_terms[key]

    def _load(self, key: str) -> Tensor:
        with safe_open(self._found[key], framework="pt") as file:
            return file.get_tensor(key)

    def _write(self, texts: list[str], device: torch.device) -> None:
        clouds: dict[str, Tensor] = {}
        by_length = sorted(texts, key=len)
        for start in range(0, len(texts), TEXTS_PER_PASS):
            batch = by_length[start : start + TEXTS_PER_PASS]
            clouds |= dict(zip(map(text_key, batch), self.clouds(batch, device), strict=True))
        name = hashlib.sha256("".join(sorted(clouds)).encode()).hexdigest()[:16]
        temporary = self.directory / f".{name}.{secrets.token_hex(4)}"
        try:
            save_file(clouds, temporary)
            os.replace(temporary, self.directory / f"{name}.safetensors")
        except SafetensorError as error:
            raise OSError(f"frozen targets were not written to {self.directory}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def clouds(self, texts: list[str], device: torch.device) -> list[Tensor]:
        """Token clouds of a few texts by one pass without a generated adapter: list of (M_i, D)."""
        input_ids, mask = tokenize(self.base, texts)
        with torch.no_grad():
            factors = None if self.factors is None else self.factors.to(device)
            hidden = self.base.hidden_states(input_ids.to(device), mask.to(device), factors)
            states = self.objective.normalize(hidden).to(hidden.dtype).cpu()
        kept = self.objective.token_mask(mask)
        return [states[row, kept[row]].contiguous() for row in range(len(texts))]

    def _scan(self) -> None:
        for path in self.directory.glob("*.safetensors"):
            try:
                with safe_open(path, framework="pt") as file:
                    self._found |= dict.fromkeys(file.keys(), path)
            except FileNotFoundError:
                continue  # another rank found it damaged first
            except SafetensorError:
                path.unlink(missing_ok=True)  # damaged: computed again


def tokenize(base: AdaptedModel, texts: list[str]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, T), padded on the right."""
    encoded = base.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    return encoded["input_ids"], encoded["attention_mask"]


def text_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
