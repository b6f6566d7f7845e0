"""A script: one life of an engine with a kvheap tier whose heap and index are files.

    python vllm_lives.py MODEL JSON OUT

JSON has ``extra`` (``kv_connector_extra_config``), ``options`` (of ``vllm.LLM``), ``rounds`` (how
often the prompts are asked, each time without the engine's own cache), ``reset`` (drop the tier's
chunks at the end) and ``end`` (``shutdown`` or ``kill``). The file OUT gets JSON: answers and
cached tokens of each round, and vLLM's counters.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from vllm_engines import Engine, prompt


def main() -> None:
    """Run, write what came of it, and end."""
    life: dict[str, Any] = json.loads(sys.argv[2])
    engine = Engine(sys.argv[1], life["extra"], **life.get("options", {}))
    prompts = [prompt(number, 200, shared=160) for number in range(3)]
    answers, cached = [], []
    for _ in range(life.get("rounds", 1)):
        answers.append(engine.generate(prompts))
        cached.append(engine.cached)
        engine.forget_device()
    if life.get("reset"):
        engine.llm.reset_prefix_cache(reset_connector=True)
    found = {"answers": answers, "cached": cached, "counters": engine.counters()}
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        engine.manager.store.check()
    Path(sys.argv[3]).write_text(json.dumps(found))
    if life.get("end") == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    main()
