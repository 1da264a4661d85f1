"""vLLM plugin: a request for the model "dialect:Nigerian English" makes that adapter if there is none yet.

Installed by entry points, and off unless VLLM_PLUGINS names hl_scale and HL_SCALE_SERVE_RUN a run directory. vLLM asks
a resolver once for each name and keeps the answer; the endpoint plugin joins the two from there on: the cache learns
which adapters are in use, and vLLM forgets one before its files are deleted, for an engine that misses them dies.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Collection
from typing import Any

from hl_scale.config import ConfigError
from hl_scale.serving.adapter_metrics import AdapterMetrics
from hl_scale.serving.adapter_service import AdapterError, AdapterService, settings_from_environment
from hl_scale.serving.engines import VLLM_RANKS
from hl_scale.serving.generator_process import GenerationFailed

_log = logging.getLogger(__name__)


_metrics = functools.cache(AdapterMetrics)  # a registry takes them once, also when the service cannot be made


@functools.cache
def service() -> AdapterService | None:
    """The one of this process, made when it is first asked for; None where nothing is configured."""
    settings = settings_from_environment()
    return None if settings is None else AdapterService(settings, _metrics())


def register() -> None:
    """Entry point of vllm.general_plugins; vLLM calls it in every one of its processes."""
    if settings_from_environment() is None:
        return
    from fastapi import HTTPException
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class HyperLoraResolver(LoRAResolver):
        """Resolves the names that the service knows."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """See `AdapterService.resolve`; its errors reach the client with their text and status."""
            adapters = service()
            if adapters is None or not adapters.serves(lora_name):
                return None
            try:
                found = await adapters.resolve(lora_name, base_model_name)
            except AdapterError as error:
                raise HTTPException(error.status, str(error)) from None
            return LoRARequest(lora_name=lora_name, lora_int_id=found.number, lora_path=str(found.directory))

    LoRAResolverRegistry.register_resolver("hl_scale", HyperLoraResolver())


class HyperLoraEndpoint:
    """Entry point of vllm.endpoint_plugins: GET /hl_scale/health, and what vLLM knows about adapters in use."""

    name = "hl_scale"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the route."""
        adapters = service()
        if adapters is None:
            return
        from fastapi.responses import JSONResponse

        @app.get("/hl_scale/health")
        async def health() -> JSONResponse:
            found = adapters.health()
            return JSONResponse(found, 200 if found["problem"] is None else 503)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Join the service to the server's list of adapters, and start its process."""
        adapters, models = service(), getattr(state, "openai_serving_models", None)
        if adapters is None or models is None:
            return
        check_arguments(adapters.config.lora.rank + adapters.task_adapters.largest_rank, args)
        models.lora_requests = known = AdaptersInUse(models.lora_requests, adapters.touch)
        adapters.before_removal = known.forget
        adapters.needed_by_engine = functools.partial(names_in_engine, engine_client)
        self.starting = asyncio.create_task(_start(adapters, models.model_config.model))


class AdaptersInUse(dict[str, Any]):
    """vLLM's table of adapters, name -> request, that tells when a name is looked up.

    Args:
        entries: adapters that the server was started with; of these nothing is told.
        used: called with the name; it may `forget` it, which then counts as not found.
    """

    def __init__(self, entries: dict[str, Any], used: Callable[[str], None]) -> None:
        super().__init__(entries)
        self._static = frozenset(entries)
        self._used = used

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name) and name not in self._static:
            self._used(str(name))
        return super().__contains__(name)

    def forget(self, names: Collection[str]) -> None:
        """Remove these names; the next request for one resolves it again."""
        for name in names:
            self.pop(name, None)


def check_arguments(rank: int, args: Any) -> None:
    """Raise ConfigError if a server with these arguments would refuse every adapter of this rank; nothing is known of
    arguments that are not there."""
    if not getattr(args, "enable_lora", True):
        raise ConfigError("the server takes no adapters\n  fix: start it with --enable-lora")
    largest = getattr(args, "max_lora_rank", rank)
    if rank > largest:
        enough = min((known for known in VLLM_RANKS if known >= rank), default=None)
        fix = f"start it with --max-lora-rank {enough}" if enough else f"vLLM serves ranks up to {VLLM_RANKS[-1]}"
        raise ConfigError(f"adapters have ranks up to {rank}, the server takes at most {largest}\n  fix: {fix}")


def names_in_engine(engine_client: Any) -> set[str]:
    """Names of the adapters that unfinished requests use."""
    return {state.lora_name for state in engine_client.output_processor.request_states.values() if state.lora_name}


async def _start(adapters: AdapterService, base_model: str) -> None:
    try:
        await adapters.start(base_model)
    except (AdapterError, GenerationFailed) as error:
        _log.error("no adapters can be generated: %s", error)  # those in the cache are served all the same
