"""Waiting for an asynchronous copy in ``asyncio``, by polling it.

No thread and no callback of the device is needed, and any number of tasks may wait for one copy. A
task that is cancelled only stops asking: the copy goes on, and can be awaited again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["until"]

FIRST_POLL_S, LAST_POLL_S = 50e-6, 2e-3
"""Seconds between two polls of what is awaited: the first, doubling up to the last."""


async def until(is_done: Callable[[], bool]) -> None:
    """Return once ``is_done()`` is true, and let other tasks run meanwhile.

    Raises:
        Exception: what ``is_done`` raises.
    """
    pause_s = FIRST_POLL_S
    while not is_done():
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_POLL_S)
