"""Adapters by name: from the cache, or generated when somebody asks for them the first time.

It knows nothing of the server that uses it (`vllm_resolver` joins the two). Everything runs in the server's event loop
but reading an adapter through, which has a thread, and generating it, which has a process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ByteSize, Field, ValidationError

from hl_scale.base.loading import base_reference
from hl_scale.conditions.sources import source
from hl_scale.conditions.typology import UnknownVarietyError
from hl_scale.config import Config, ConfigError, load_config
from hl_scale.config.section import Section
from hl_scale.data.shards import MANIFEST
from hl_scale.engine import checkpoint
from hl_scale.serving.adapter_cache import AdapterCache, BadAdapterError, CacheError, adapter_id, adapter_key
from hl_scale.serving.adapter_metrics import AdapterMetrics
from hl_scale.serving.generator_process import GenerationFailed, GenerationRefused, GeneratorProcess
from hl_scale.serving.registered_adapters import RegisteredAdapter, RegisteredAdapters

PREFIX = "HL_SCALE_SERVE_"
MAXIMUM_NAME = 200
"""Characters of a dialect or task name; of a dialect with a task, of both together."""
TASK = "+task:"
"""Stands between a dialect and the name of a registered task adapter."""
GENERATION_SECONDS = 300.0
"""A generation that takes longer counts as hanging: its process is killed."""
KEEP_SECONDS = 60.0
"""An adapter that was asked for so recently is not removed: its request may not have reached the engine yet."""

_log = logging.getLogger(__name__)


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


class ServingSettings(Section):
    """What the environment says, each field as HL_SCALE_SERVE_<FIELD>."""

    run: Path
    """Run directory whose hypernetwork generates the adapters. Unless it is set, nothing is served."""
    step: int | None = Field(None, ge=0)
    """Checkpoint; the newest at the start of the server unless given."""
    base: str | None = None
    """The served model, as vLLM names it, if it is the run's base under another name or path."""
    cache: Path = Path("~/.cache/hl_scale/adapters")
    """Directory of generated adapters; each server needs its own."""
    cache_bytes: ByteSize = Field(ByteSize(10_000_000_000), gt=0)
    """Bound on the cache, for example 2GB."""
    deadline: float = Field(60.0, gt=0)
    """Seconds requests wait for an adapter, from the first one on; who leaves sooner does not stop the generation."""
    waiting: int = Field(16, ge=1)
    """Adapters that may be generated or wait for it at one time; further new ones are turned away."""
    description_characters: int = Field(0, ge=0)
    """Longest "description:WORDS" that is taken; 0 takes none."""
    task_adapters: Annotated[dict[str, Path], BeforeValidator(_parsed)] = Field(default_factory=dict)
    """Task adapters that clients may ask for together with a dialect, as JSON: {"NAME": "PEFT directory"}. The model
    "dialect:Nigerian English+task:NAME" is the sum of both."""


def settings_from_environment(environment: Mapping[str, str] = os.environ) -> ServingSettings | None:
    """The settings, or None where HL_SCALE_SERVE_RUN is not set.

    Raises:
        ConfigError: a variable that does not exist, or a value that cannot be right.
    """
    values = {
        name.removeprefix(PREFIX).lower(): value for name, value in environment.items() if name.startswith(PREFIX)
    }
    if not values.get("run"):
        return None
    try:
        return ServingSettings.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = PREFIX + str(problem["loc"][0]).upper()
        known = ", ".join(PREFIX + field.upper() for field in ServingSettings.model_fields)
        raise ConfigError(f"{name}: {problem['msg']}\n  fix: correct or unset it; known are {known}") from None


class AdapterError(Exception):
    """No adapter for this request. `status` is the HTTP status that says whose fault it is."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Wanted:
    """What a model name stands for."""

    condition: str
    task_adapter: RegisteredAdapter | None


@dataclass(frozen=True)
class Adapter:
    """A verified adapter on disk."""

    key: str
    number: int
    """See `adapter_id`."""
    directory: Path


class AdapterService:
    """Adapters of one run for one served base model.

    Args:
        settings: which run, which cache, and the bounds.
        metrics: counters and gauges.

    Raises:
        ConfigError: no run directory, one without the checkpoint, or a task adapter that cannot be used.
        BaseModelError: the run's base is not on this machine, and `settings.base` does not say what stands for it.
        CacheError: another server owns the cache.
    """

    def __init__(self, settings: ServingSettings, metrics: AdapterMetrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.config = load_config(settings.run / "config.yaml", environment={})
        if self.config.data.kind == "dialects":
            # Says now, rather than to a client, that its data is not installed.
            source(self.config.dialects.vectors).varieties()
        self.checkpoint = _checkpoint(settings)
        self.step = checkpoint.step_of(self.checkpoint)
        self._base = settings.base or base_reference(self.config.base)  # may convert a packaged model: not in a request
        manifest = (self.checkpoint / checkpoint.MANIFEST).read_bytes()
        self._identity = _identity(self.config, manifest)
        fingerprint = json.loads(manifest)["base_fingerprint"]
        self.task_adapters = RegisteredAdapters(settings.task_adapters, self.config, settings.base, fingerprint)
        self.cache = AdapterCache(settings.cache, settings.cache_bytes)
        self.generator: GeneratorProcess | None = None
        self.needed_by_engine: Callable[[], Collection[str]] | None = None
        """Gives the names that unfinished requests use. Unless it is set, what was handed out is never removed."""
        self.before_removal: Callable[[Collection[str]], None] = lambda names: None
        """Told the names of adapters that are about to be deleted, or of which the files turn out to be gone."""
        self._keys: dict[str, str] = {}  # of every name that was handed out
        self._used: dict[str, float] = {}
        self._numbers: dict[int, str] = {}
        self._flights: dict[str, asyncio.Task[Adapter]] = {}
        self._begun: dict[str, float] = {}  # seconds of the event loop at which a flight began
        self._generating = 0
        self._show_cache()

    def serves(self, name: str) -> bool:
        """Whether a model name is meant for this service; others belong to other resolvers."""
        return name.startswith(("dialect:", "task:", "description:", "features:"))

    async def start(self, base_model: str) -> None:
        """Start the generator process, so that the first request need not wait for it.

        Raises:
            AdapterError: the served model is another one than the run's base.
            GenerationFailed: the process cannot read the run.
        """
        await self._generator(base_model).start()

    async def resolve(self, name: str, base_model: str) -> Adapter:
        """The adapter of a model name, generated if need be; once, however many ask at the same time.

        Args:
            name: "dialect:NAME", "task:NAME" or "description:WORDS"; "dialect:NAME+task:NAME" for the sum of a
                dialect's adapter and a registered task adapter.
            base_model: path or hub id of the served model, as the server names it.

        Raises:
            AdapterError: says why there is none.
        """
        try:
            found = await self._resolve(name, base_model)
        except AdapterError as error:
            outcome = "busy" if error.status == 429 else "refused" if error.status < 500 else "failed"
            self.metrics.requests.labels(outcome=outcome).inc()
            raise
        self._keys[name] = found.key
        self.touch(name)
        return found

    async def _resolve(self, name: str, base_model: str) -> Adapter:
        wanted = self._wanted(name)
        self._check_base(base_model)
        added = () if wanted.task_adapter is None else (wanted.task_adapter.fingerprint,)
        key = adapter_key(self._identity, base_model, wanted.condition, *added)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._produce(key, wanted, base_model))
            flight.add_done_callback(lambda done: self._landed(key, done))
            self._begun[key] = asyncio.get_running_loop().time()
        else:
            self.metrics.requests.labels(outcome="joined").inc()
        try:
            # Not from now on: vLLM lets requests for one name ask one after the other, and their waiting would add up.
            async with asyncio.timeout_at(self._begun[key] + self.settings.deadline):
                return await asyncio.shield(flight)  # whoever waits may leave; the adapter is made all the same
        except TimeoutError:
            raise AdapterError(
                503, f"the adapter of {name!r} is not ready after {self.settings.deadline:g} s; ask again later"
            ) from None

    def touch(self, name: str) -> None:
        """Note that a request uses an adapter that was handed out under this name.

        If its files are gone, `before_removal` is told: who asks again for the name gets a new one.
        """
        key = self._keys.get(name)
        if key is None:
            if self.serves(name):  # removed while the server was still loading it
                self.before_removal([name])
            return
        self._used[key] = time.monotonic()
        try:
            self.cache.touch(key)
        except FileNotFoundError:  # by another hand
            self._remove(key)

    def health(self) -> dict[str, object]:
        """What an operator wants to know; "problem" is None when all is well."""
        generator = self.generator
        return {
            "run": str(self.settings.run), "step": self.step, "cache": str(self.cache.directory),
            "adapters": len(self.cache.keys), "cache_bytes": self.cache.bytes, "waiting": self._generating,
            "generator_running": generator is not None and generator.running,
            "problem": None if generator is None else generator.problem,
        }  # fmt: skip

    def _wanted(self, name: str) -> Wanted:
        dialect, separator, task = name.partition(TASK)
        if not separator or not name.startswith("dialect:"):
            return Wanted(self._condition(name), None)
        if len(name) > MAXIMUM_NAME:
            raise AdapterError(400, f"a name has at most {MAXIMUM_NAME} characters, not {len(name)}")
        condition = self._condition(dialect)
        try:
            return Wanted(condition, self.task_adapters.find(task.strip()))
        except LookupError as error:
            raise AdapterError(404, str(error)) from None

    def _condition(self, name: str) -> str:
        """A model name as a condition; two names of one dialect give the same one."""
        kind, _, value = name.partition(":")
        value = value.strip()
        limit = self.settings.description_characters
        if kind == "features":
            raise AdapterError(400, "features: names a file, and files of the server are not read for clients")
        if kind == "description" and not limit:
            raise AdapterError(
                403, f"descriptions are not served here (the operator sets {PREFIX}DESCRIPTION_CHARACTERS)"
            )
        if kind != "description":
            limit = MAXIMUM_NAME
        if not value or not value.isprintable() or len(value) > limit:
            raise AdapterError(400, f"{kind}: takes 1 to {limit} printable characters, not {len(value)} like these")
        if kind == "dialect":
            try:
                known = source(self.config.dialects.vectors if self.config.data.kind == "dialects" else "ewave")
                return f"dialect:{known.resolve(value)}"
            except UnknownVarietyError as error:
                raise AdapterError(404, str(error)) from None
        return f"{kind}:{value}"

    def _check_base(self, base_model: str) -> None:
        if base_model != self._base and Path(base_model).resolve() != Path(self._base).resolve():
            raise AdapterError(
                503, f"the server's model is {base_model}, but this run's adapters are for {self._base} (if they are "
                f"the same model, the operator sets {PREFIX}BASE={base_model})"
            )  # fmt: skip

    def _generator(self, base_model: str) -> GeneratorProcess:
        self._check_base(base_model)
        if self.generator is None:
            self.generator = GeneratorProcess([str(self.settings.run), "--step", str(self.step), "--model", base_model])
        return self.generator

    async def _produce(self, key: str, wanted: Wanted, base_model: str) -> Adapter:
        """From the cache if what is there reads well, or else generated."""
        if key in self.cache:
            try:
                await asyncio.to_thread(self.cache.verify, key, base_model)
                return self._ready(key, "cached")
            except BadAdapterError as error:
                _log.warning("made again: %s", error)
                self.metrics.damaged.inc()
        if self._generating >= self.settings.waiting:
            raise AdapterError(429, f"{self._generating} adapters are being generated; ask again later")
        self._generating += 1
        try:
            self.metrics.waiting.set(self._generating)
            await self._generate(key, wanted, base_model)
        finally:
            self._generating -= 1
            self.metrics.waiting.set(self._generating)
        return self._ready(key, "generated")

    def _ready(self, key: str, outcome: str) -> Adapter:
        self._used[key] = time.monotonic()  # at once: another may land before those who wait for this one wake up
        self.metrics.requests.labels(outcome=outcome).inc()
        return Adapter(key, adapter_id(key, self._numbers), self.cache.path(key))

    async def _generate(self, key: str, wanted: Wanted, base_model: str) -> None:
        generator = self._generator(base_model)
        self._remove(key)
        request = {
            "condition": wanted.condition, "directory": str(self.cache.path(key)), "base_model": base_model,
            "facts": {"cache_key": key}, "task_adapter": wanted.task_adapter and wanted.task_adapter.request(),
        }  # fmt: skip
        try:
            seconds = await generator.generate(request, GENERATION_SECONDS)
            await asyncio.to_thread(self.cache.verify, key, base_model)
        except GenerationRefused as error:
            raise AdapterError(404, str(error)) from None
        except (GenerationFailed, BadAdapterError) as error:
            raise AdapterError(503, f"the adapter could not be generated: {error}") from None
        finally:
            self.metrics.starts.set(generator.starts)
        self.metrics.seconds.observe(seconds)
        self.cache.add(key)
        self._make_room(key)

    def _make_room(self, new: str) -> None:
        """Remove what was not used for longest; the new adapter itself, if nothing else can go."""
        recent = {key for key, used in self._used.items() if time.monotonic() - used < KEEP_SECONDS}
        names = self._keys if self.needed_by_engine is None else self.needed_by_engine()
        needed = {new, *recent, *self._flights, *(self._keys[name] for name in names if name in self._keys)}
        for key in self.cache.victims(needed):
            self._remove(key)
            self.metrics.evictions.inc()
        if self.cache.bytes > self.cache.maximum_bytes:
            self._remove(new)
            self._show_cache()
            raise AdapterError(
                503, f"the adapter cache ({self.cache.maximum_bytes} bytes) is full of adapters in use; ask again "
                f"later (the operator raises {PREFIX}CACHE_BYTES)"
            )  # fmt: skip
        self._show_cache()

    def _remove(self, key: str) -> None:
        """Delete an adapter, if it is there; its names are forgotten before."""
        names = [name for name, own in self._keys.items() if own == key]
        self.before_removal(names)
        for name in names:
            del self._keys[name]
        self._used.pop(key, None)
        self.cache.remove(key)

    def _show_cache(self) -> None:
        self.metrics.cache_bytes.set(self.cache.bytes)
        self.metrics.adapters.set(len(self.cache.keys))

    def _landed(self, key: str, done: asyncio.Task[Adapter]) -> None:
        del self._flights[key], self._begun[key]
        if not done.cancelled():
            done.exception()  # nobody may be waiting any more


def _checkpoint(settings: ServingSettings) -> Path:
    """Directory of the checkpoint to use; the generator process verifies it."""
    found = checkpoint.find(settings.run / "checkpoints")
    chosen = [path for path in found if settings.step in (None, checkpoint.step_of(path))]
    if not chosen:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(
            f"{settings.run} has no checkpoint{'' if settings.step is None else f' of step {settings.step}'} "
            f"(found: {names})\n  fix: set {PREFIX}RUN and {PREFIX}STEP to a trained run and one of its steps"
        )
    return chosen[-1]


def _identity(config: Config, manifest: bytes) -> str:
    """Of what adapters are made of: the checkpoint, how it is used, and for a task run what its tasks say."""
    used = {
        name: getattr(config, name).model_dump(mode="json") for name in ("base", "lora", "hypernetwork", "conditions")
    }
    digest = hashlib.sha256(manifest + json.dumps(used, sort_keys=True).encode())
    tasks = Path(config.data.directory) / MANIFEST
    if config.data.kind == "tasks" and tasks.is_file():
        digest.update(tasks.read_bytes())
    return digest.hexdigest()


__all__ = [
    "Adapter", "AdapterError", "AdapterService", "CacheError", "ServingSettings", "settings_from_environment",
]  # fmt: skip
