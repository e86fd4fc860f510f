"""Death of a vLLM engine: it ends every wait on the engine. vLLM itself only fails requests; other calls would hang."""

import asyncio
from collections.abc import Awaitable
from typing import Any

_POLL_S = 0.2


class EngineDead(RuntimeError):
    """The vLLM engine behind this actor is gone; only a new actor helps."""


class DeathWatch:
    """Watches one `AsyncLLM` from inside its event loop, until it dies or is shut down."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._death = asyncio.create_task(self._wait())

    async def or_death(self, call: Awaitable[Any], doing: str) -> Any:
        """Await a call to the engine. Raises EngineDead, naming `doing`, within a poll of the engine's death."""
        task = asyncio.ensure_future(call)
        try:
            await asyncio.wait((task, self._death), return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
        if self._engine.errored and (not task.done() or task.exception()):
            raise EngineDead(f"vLLM's engine process died while {doing}")
        return task.result()

    async def _wait(self) -> None:
        while not self._engine.errored:
            await asyncio.sleep(_POLL_S)
