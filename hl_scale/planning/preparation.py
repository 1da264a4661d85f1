"""What a run computes and keeps before its first step, by the kind of its data.

Sizes in memory of what is read are written down as they were measured (Python 3.11): they come with a run only.
"""

from __future__ import annotations

import json
from pathlib import Path

from hl_scale.conditions.descriptions import encoder_directory
from hl_scale.config import Config
from hl_scale.data.shards import CorpusError, read_manifest
from hl_scale.engine.base_states import TEXTS_PER_PASS as DESCRIPTIONS_PER_PASS
from hl_scale.engine.targets import CLOUDS_IN_MEMORY, TEXTS_PER_CHUNK, TEXTS_PER_PASS
from hl_scale.planning import tracing
from hl_scale.planning.jobs import Job
from hl_scale.planning.phases import DESCRIPTIONS, ENCODER, LIBRARY, TARGETS

PAIR = 3_100
"""Bytes of a training pair in memory: its texts, vector and order (14,000 pairs took 30 MB more than 4,200)."""
EXAMPLE = 1_300
"""Bytes of an example of a task: its texts, and their tokens."""


def loads_encoder(config: Config) -> bool:
    """Whether a run holds a sentence encoder, which is on the CPU wherever the base is."""
    return config.data.kind == "tasks" and bool(config.conditions.sentence_encoders)


class Preparation:
    """Bytes of a run's data and of what is computed from them before training.

    Args:
        job: what is trained.
        on_cpu: whether resident memory of the process is counted, or tensors on a GPU alone.
    """

    def __init__(self, job: Job, on_cpu: bool) -> None:
        self.job, self.config, self.on_cpu = job, job.config, on_cpu
        self.item = next(job.hypernetwork.parameters()).element_size()
        self._traced: dict[tuple[int, int], int] = {}

    @property
    def data(self) -> int:
        """Of what is trained on, as it is read. A task set that is not there yet counts nothing."""
        if self.config.data.kind == "dialects":
            data = self.config.dialects
            rows = len(data.training_varieties) if data.mode == "named" else data.variants_per_sentence
            return data.training_sentences * (rows + data.identity_per_sentence) * PAIR
        return self._count("examples") * EXAMPLE

    def _count(self, what: str) -> int:
        """Of a task set; 0 if it is not there yet."""
        try:
            counts = read_manifest(Path(self.config.data.directory)).get("counts", {})
        except CorpusError:
            return 0
        return int(counts.get(what, 0))

    def phase(self, tokens: int) -> tuple[str, dict[str, int]]:
        """Name of the phase before the engine is built, and its parts."""
        if self.config.data.kind == "dialects":
            sentences = self.config.dialects.training_sentences
            clouds = self._clouds(min(TEXTS_PER_CHUNK, sentences), tokens) if self.on_cpu else 0
            bare = self._bare(min(TEXTS_PER_PASS, sentences), tokens)
            return "targets", {tracing.ACTIVATIONS: bare, TARGETS: clouds}
        if self.job.kind == "reconstruction" and self.on_cpu:
            # Mean and squared deviations in float64; the adapter at hand in float32, as it is stored and as it is used.
            return "library", {ENCODER: self._encoder, LIBRARY: (2 * 8 + 2 * 4) * self._adapter}
        parts = {ENCODER: self._encoder, DESCRIPTIONS: self._embedded}
        if self.config.conditions.base_encodes:
            length = min(self.config.conditions.maximum_tokens, self.job.base.context_length)
            parts[tracing.ACTIVATIONS] = self._bare(DESCRIPTIONS_PER_PASS, length)
        return "descriptions", parts

    def held(self, tokens: int) -> dict[str, int]:
        """What stays while steps are made."""
        if self.config.data.kind == "dialects":
            training = self.config.training
            sentences = min(CLOUDS_IN_MEMORY, self.config.dialects.training_sentences)
            sentences = min(sentences, training.steps * training.global_batch_size)
            return {TARGETS: self._clouds(sentences, tokens) if self.on_cpu else 0}
        return {ENCODER: self._encoder, DESCRIPTIONS: self._embedded, LIBRARY: self._spread}

    def _clouds(self, sentences: int, tokens: int) -> int:
        return sentences * tokens * self.job.base.hidden_size * self.item

    def _bare(self, texts: int, tokens: int) -> int:
        key = (texts, tokens)
        if key not in self._traced:
            self._traced[key] = tracing.trace_bare_pass(self.job.base, texts, tokens)
        return self._traced[key]

    @property
    def _encoder(self) -> int:
        """Of the sentence encoders' weights; 0 where they are not on this machine."""
        if not self.on_cpu or not loads_encoder(self.config):
            return 0
        settings = self.config.conditions
        found = (encoder_directory(settings.only(name)) for name in settings.sentence_encoders)
        files = (file for directory in found if directory is not None for file in directory.glob("*.safetensors"))
        return sum(sum(tensor_sizes(file)) for file in files)

    @property
    def _embedded(self) -> int:
        """Of the conditions of all wordings, float32, in host memory; those that are held out are counted too."""
        if not self.on_cpu or self.config.conditions.kind == "one_hot":
            return 0
        return 4 * self._count("descriptions") * self.job.hypernetwork.condition_size

    @property
    def _adapter(self) -> int:
        """Numbers of one adapter."""
        network = self.job.hypernetwork
        return sum(network.rank * (slot.in_features + slot.out_features) for slot in network.slots)

    @property
    def _spread(self) -> int:
        """Of the library's standard deviations, float32, where errors are divided by them."""
        if self.job.kind != "reconstruction":
            return 0
        settings = self.config.reconstruction
        return 4 * self._adapter if settings.targets == "factors" and settings.z_score else 0


def tensor_sizes(file: Path) -> list[int]:
    """Bytes of each tensor in a safetensors file, from its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return [end - start for start, end in (entry["data_offsets"] for entry in header.values())]
