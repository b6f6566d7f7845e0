"""A script: two rounds of prompts with a shared head through an engine with a kvheap tier.

    python vllm_rounds.py MODEL OPTIONS OUT

OPTIONS are keyword arguments of ``vllm.LLM`` as JSON. The file OUT gets JSON: answers and cached
tokens of both rounds, answers from the engine's own cache, and vLLM's counters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm_engines import Engine, prompt


def main() -> None:
    """Run, and write what came of it."""
    engine = Engine(sys.argv[1], {}, **json.loads(sys.argv[2]))
    prompts = [prompt(number, 200, shared=160) for number in range(3)]
    answers, cached = [], []
    for _ in range(2):
        answers.append(engine.generate(prompts))
        cached.append(engine.cached)
        own = engine.generate(prompts)
        engine.forget_device()
    found = {"answers": answers, "own": own, "cached": cached, "counters": engine.counters()}
    Path(sys.argv[3]).write_text(json.dumps(found))
    engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    main()
