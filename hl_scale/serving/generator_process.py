"""A process of its own that generates adapters, and the asynchronous side that talks to it.

A server must not wait for torch, nor die with it: the hypernetwork lives in a child process, which can be killed and
started again. Both sides exchange lines of JSON over pipes, one request at a time:

    <- {"ready": {"step": 1000}}                   once; or {"failed": "why"} and the process ends
    -> {"condition": "dialect:Indian English", "directory": "/cache/<key>", "base_model": "/models/gemma", "facts": {},
        "task_adapter": null}                      or to add one {"directory": "/adapters/mood", "fingerprint": "3f.."}
    <- {"seconds": 0.07}                           or {"refused": "not a condition"} or {"failed": "why"}

The child ends when its input does, so also when the server is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

START_SECONDS = 600.0
"""The process is killed if it has not read its checkpoint by then."""


class GenerationRefused(ValueError):
    """The condition is not one of the run's; asking again cannot help."""


class GenerationFailed(RuntimeError):
    """The adapter could not be generated for a reason that is not the condition's."""


class GeneratorProcess:
    """Starts the process when it is first needed, and again after it died.

    Args:
        arguments: of `main`.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.command = [sys.executable, "-m", "hl_scale.serving.generator_process", *arguments]
        self.starts = 0
        self.problem: str | None = None
        """Why the latest start or request failed; None after one that did not."""
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it unless it runs.

        Raises:
            GenerationFailed: it cannot read the run, or takes too long.
        """
        async with self._turn:
            await self._start()

    async def generate(self, request: Mapping[str, Any], timeout: float) -> float:
        """Have one adapter written.

        Args:
            request: see the module docstring.
            timeout: seconds after which the process counts as hanging and is killed; starting it does not count.

        Returns:
            Seconds that it took.

        Raises:
            GenerationRefused: not a condition of the run.
            GenerationFailed: it could not be written, or the process died or was killed.
        """
        async with self._turn:
            await self._start()
            reply = await self._exchange(request, timeout)
        if "refused" in reply:
            raise GenerationRefused(reply["refused"])
        if "failed" in reply:
            self.problem = reply["failed"]
            raise GenerationFailed(reply["failed"])
        return float(reply["seconds"])

    async def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._process = None

    async def _start(self) -> None:
        if self.running:
            return
        await self.stop()
        self.starts += 1
        pipe = asyncio.subprocess.PIPE
        # A session of its own: Ctrl-C in a terminal is for the server, which then closes the pipe.
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.command, stdin=pipe, stdout=pipe, start_new_session=True
            )
        except OSError as error:
            self.problem = f"the generator process cannot be started: {error}"
            raise GenerationFailed(self.problem) from None
        reply = await self._exchange(None, START_SECONDS)
        if "failed" in reply:
            self.problem = reply["failed"]
            await self.stop()
            raise GenerationFailed(reply["failed"])

    async def _exchange(self, request: Mapping[str, Any] | None, timeout: float) -> dict[str, Any]:
        """Send a request, if any, and read one reply; whatever goes wrong, the process is not left in the middle."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            async with asyncio.timeout(timeout):
                if request is not None:
                    process.stdin.write((json.dumps(request) + "\n").encode())
                    await process.stdin.drain()
                line = await process.stdout.readline()
            reply = json.loads(line)
        except TimeoutError:
            self.problem = f"the generator process did not answer within {timeout:g} s and was killed"
        except (OSError, ValueError):
            code = process.returncode
            self.problem = f"the generator process died{'' if code is None else f' (status {code})'}; its log says why"
        except asyncio.CancelledError:
            await self.stop()
            raise
        else:
            self.problem = None
            return reply
        await self.stop()
        raise GenerationFailed(self.problem)


def main(arguments: Sequence[str] | None = None) -> None:
    """The process: reads the run once, then requests from standard input until it ends."""
    parser = argparse.ArgumentParser(description="Generates adapters of a run; speaks JSON over pipes.")
    parser.add_argument("run", help="run directory")
    parser.add_argument("--step", type=int, help="checkpoint; the newest unless given")
    parser.add_argument("--model", help="directory or hub id of the base, for its config.json")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Whatever prints goes to the log: standard output is for replies.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        run = _load(options)
    except Exception as error:
        _reply(replies, {"failed": f"{options.run} cannot be used: {_text(error)}"})
        sys.exit(1)
    _reply(replies, {"ready": {"step": run.step}})
    for line in sys.stdin:
        _reply(replies, _generate(run, json.loads(line)))


def _load(options: argparse.Namespace) -> Any:
    from hl_scale.engine.run import load_generator

    run = load_generator(options.run, options.step, options.model)
    if run.base.from_multimodal:
        raise ValueError(
            "its base is a multimodal checkpoint, where layers have other paths: an adapter would change nothing\n"
            "  fix: serve merged checkpoints instead (hl-scale export --merged)"
        )
    return run


def _generate(run: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    from hl_scale.serving.export import generate_adapter

    started = time.perf_counter()
    try:
        run.conditions.parse(request["condition"])
    except ValueError as error:
        return {"refused": _text(error)}
    except Exception as error:
        return {"failed": _text(error)}
    try:
        generate_adapter(
            run, request["condition"], request["directory"],
            base_model_name_or_path=request["base_model"], facts=request["facts"],
            with_adapter=_task_adapter(run, request), force=True,
        )  # fmt: skip
    except Exception as error:  # the server says so and lives on
        logging.getLogger(__name__).exception("no adapter for %r", request["condition"])
        return {"failed": _text(error)}
    return {"seconds": time.perf_counter() - started}


def _task_adapter(run: Any, request: Mapping[str, Any]) -> Any:
    """What the request adds, if anything; ValueError if it is no longer what the server knows under its key."""
    from hl_scale.base import read_task_adapter

    wanted = request.get("task_adapter")
    if wanted is None:
        return None
    found = read_task_adapter(wanted["directory"], run.base, run.config.base, [request["base_model"]])
    if found.fingerprint != wanted["fingerprint"]:
        raise ValueError(f"the task adapter {found.name} has changed since the server started\n  fix: start it again")
    return found


def _text(error: Exception) -> str:
    return f"{'' if isinstance(error, ValueError) else f'{type(error).__name__}: '}{error}"[:2000]


def _reply(stream: TextIO, reply: Mapping[str, Any]) -> None:
    stream.write(json.dumps(reply) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
