"""``kvheap replay``: the figures, the files, the exit status, and what it says when it cannot."""

from __future__ import annotations

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optional import need_matplotlib

from kvheap import __version__
from kvheap.cli import CommandError, main
from kvheap.cli import replay as replay_command
from kvheap.cli.replay import parse_bytes
from kvheap.cli.texts import REPLAY_NOTES
from kvheap.prefix import POLICIES, PrefixStore
from kvheap.replay import copies
from kvheap.replay.engine_cache import ENGINE_LAYOUTS, EngineCache
from kvheap.replay.replay import Replay

TRACE = Path(__file__).parents[3] / "shared" / "traces" / "conversation_trace.jsonl"
LINE = '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}\n'


def figures_of(tmp_path: Path, *arguments: object) -> dict[str, object]:
    out = tmp_path / "out.json"
    assert main(["replay", *map(str, arguments), "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["hits"] + figures["stored"] + figures["resident"] == figures["block_refs"]
    assert figures["mismatches"] == 0
    return figures


@pytest.mark.skipif(not TRACE.exists(), reason="needs the conversation trace beside the checkout")
class TestConversationTrace:
    def test_a_heap_that_holds_all_finds_every_shared_prefix(self, tmp_path: Path) -> None:
        figures = figures_of(tmp_path, TRACE, "--geometry", "tiny", "--heap", "1GiB")
        assert figures["requests"] == 12_031
        assert figures["block_refs"] == 288_500
        assert figures["hits"] == 105_710
        assert figures["stored"] == 182_790
        assert figures["evicted"] == 0

    def test_a_small_heap_evicts_and_stays_full(self, tmp_path: Path) -> None:
        figures = figures_of(tmp_path, TRACE, "--heap", "64MiB", "--requests", "2000")
        assert figures["evicted"] > 0
        assert figures["utilization_peak"] > 0.99


class TestMadeUpTraffic:
    def test_the_json_has_every_figure(self, tmp_path: Path) -> None:
        figures = figures_of(tmp_path, "--requests", "1000", "--heap", "4MiB")
        assert figures["requests"] == 1000
        assert figures["hits"] > 0
        assert figures["evicted"] == figures["stored"] - 1024 * figures["utilization_final"]
        for name in ("batched_allocate_us", "batched_free_us"):
            assert 0 < figures[name]["p50"] <= figures[name]["p99"]
        for name in ("gather_gbps", "scatter_gbps", "seconds", "utilization_peak"):
            assert figures[name] > 0
        for name in ("free_extents", "largest_free_bytes", "device", "versions"):
            assert name in figures

    def test_speeds_are_shown_if_calls_move_many_bytes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments = ("--requests", "100", "--heap", "1MiB")
        figures = figures_of(tmp_path, *arguments)
        table = capsys.readouterr().out
        for name, words in (("gather", "gathered"), ("scatter", "scattered")):
            assert 0 < figures[f"{name}_call"]["bytes"] < 1 << 20
            assert f"{words}, a call" in table
        assert "GB/s" not in table
        monkeypatch.setattr(replay_command, "SPEED_FROM_BYTES", 1)
        figures_of(tmp_path, *arguments)
        assert capsys.readouterr().out.count("GB/s") == 2

    @pytest.mark.parametrize("policy", POLICIES)
    def test_the_policy_is_shown_and_changes_the_hits_only(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str
    ) -> None:
        arguments = ("--requests", "400", "--heap", "1MiB")
        default = figures_of(tmp_path, *arguments)
        capsys.readouterr()
        chosen = figures_of(tmp_path, *arguments, "--policy", policy)
        assert (default["policy"], chosen["policy"]) == ("lru", policy)
        assert any(
            "policy" in line and policy in line for line in capsys.readouterr().out.splitlines()
        )
        assert default["block_refs"] == chosen["block_refs"]
        assert chosen["evicted"] > 0
        assert (default["hits"] == chosen["hits"]) == (policy == "lru")

    def test_with_memory_the_default_is_of_a_real_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(replay_command, "available_bytes", lambda: 3 << 30)
        monkeypatch.setattr(replay_command, "MODEL_HEAP", "160MiB")
        monkeypatch.setattr(replay_command, "MODEL_REQUESTS", 5)
        figures = figures_of(tmp_path)
        assert (figures["geometry"], figures["chunk_bytes"]) == ("qwen2.5-0.5b", 6 << 20)
        assert (figures["requests"], figures["heap_bytes"]) == (5, 160 << 20)
        for arguments in (("--geometry", "tiny"), ("--heap", "1MiB")):
            assert figures_of(tmp_path, "--requests", "5", *arguments)["geometry"] == "tiny"
        (tmp_path / "trace.jsonl").write_text(LINE)
        assert figures_of(tmp_path, tmp_path / "trace.jsonl")["geometry"] == "tiny"

    def test_latency_and_bandwidth_are_apart(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ("--geometry", "qwen2.5-0.5b", "--heap", "160MiB", "--requests", "5")
        figures_of(tmp_path, *arguments)
        sections = [part for part in capsys.readouterr().out.split("├") if part.strip()]
        (calls,) = [part for part in sections if "a call" in part]
        (speeds,) = [part for part in sections if "GB/s" in part]
        assert calls != speeds
        assert "p50 / p99" in calls

    def test_policies_are_compared_as_they_replay(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ("--requests", "300", "--heap", "1MiB", "--compare")
        for policy in ("lru", "s3fifo"):
            figures = figures_of(tmp_path, *arguments, "--policy", policy)
            rows = {(row["policy"], row["heap_bytes"]): row for row in figures["compared"]}
            assert len(rows) == 4 * 5
            assert rows[policy, 1 << 20]["hit_rate"] == figures["hit_rate"]
        printed = capsys.readouterr().out
        assert "lru / gdsf / s3fifo / arc" in printed
        assert "in 512 KiB" in printed
        unlimited = figures_of(tmp_path, "--requests", "300", "--heap", "64MiB")
        assert unlimited["evicted"] == 0
        assert figures["most_hits"] == unlimited["hit_rate"]

    def test_the_same_seed_is_the_same_traffic(self, tmp_path: Path) -> None:
        runs = [figures_of(tmp_path, "--requests", "300", "--seed", seed) for seed in (1, 1, 2)]
        counts = [(run["hits"], run["stored"]) for run in runs]
        assert counts[0] == counts[1] != counts[2]

    @pytest.mark.parametrize("geometry", ["gpt-oss-20b", "deepseek-v3"])
    def test_a_real_geometry(self, tmp_path: Path, geometry: str) -> None:
        arguments = ("--geometry", geometry, "--requests", "4", "--heap", "700MiB")
        assert figures_of(tmp_path, *arguments)["stored"] > 0

    def test_the_picture_is_drawn(self, tmp_path: Path) -> None:
        need_matplotlib()
        picture = tmp_path / "heap.png"
        figures_of(tmp_path, "--requests", "50", "--plot", picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000

    def test_a_picture_of_a_clock_that_steps_back_and_of_requests_without_chunks(
        self, tmp_path: Path
    ) -> None:
        need_matplotlib()
        trace, picture = tmp_path / "trace.jsonl", tmp_path / "heap.png"
        lines = [LINE.replace('p": 0', f'p": {time_ms}') for time_ms in (5000, 9000, 100)]
        for content in ("".join(lines), LINE.replace("[1, 2]", "[]")):
            trace.write_text(content)
            figures_of(tmp_path, trace, "--plot", picture)
            assert picture.read_bytes().startswith(b"\x89PNG")

    def test_what_is_stored_behind_a_gap_or_named_twice_is_resident(self, tmp_path: Path) -> None:
        trace = tmp_path / "trace.jsonl"
        ids = ("[1, 2, 3]", "[9, 2, 3]", "[1, 1, 7, 7]")
        trace.write_text("".join(LINE.replace("[1, 2]", each) for each in ids))
        figures = figures_of(tmp_path, trace)
        # Hits: 1 and 1 of the last. Stored: 1 2 3, 9, 7. Resident: 2 3 behind 9, the second 7.
        counts = [figures[name] for name in ("hits", "stored", "resident", "evicted")]
        assert counts == [2, 5, 3, 0]

    @pytest.mark.parametrize("engine_layout", [None, "vllm-flash-nhd", "opaque"])
    def test_a_trace_of_small_chunks(self, tmp_path: Path, engine_layout: str | None) -> None:
        trace = tmp_path / "trace.jsonl.gz"
        rows = [
            {
                "chat_id": at,
                "timestamp": at + 0.5,
                "input_length": 16 * at + 3,
                "output_length": 1,
                "hash_ids": [(1 << 64) - 1 - number for number in range(at + 1)],
            }
            for at in range(1, 20)
        ]
        trace.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
        more = () if engine_layout is None else ("--engine-layout", engine_layout)
        figures = figures_of(tmp_path, trace, *more)
        assert figures["chunk_tokens"] == 16
        assert figures["stored"] == 20
        assert figures["hits"] == sum(range(2, 20))
        larger = figures_of(tmp_path, trace, *more, "--chunk-tokens", "32")
        assert larger["chunk_tokens"] == 32
        assert larger["chunk_bytes"] == 2 * figures["chunk_bytes"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--chunk-tokens", "0"), "--chunk-tokens must be positive, got 0"),
            (("--chunk-tokens", "24", "--engine-layout", "mla"), "not whole blocks of 16"),
            (("--chunk-tokens", "24", "--engine-layout", "opaque"), "have a multiple of 16 tokens"),
        ],
    )
    def test_chunks_that_cannot_be(
        self, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
    ) -> None:
        assert main(["replay", "--requests", "3", *arguments]) == 2
        assert message in capsys.readouterr().err

    def test_hits_are_checked_in_pieces_of_bounded_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = []
        gather = copies.gather_blocks

        def gather_and_count(buffer, addresses, out):
            rows.append(len(out))
            return gather(buffer, addresses, out)

        monkeypatch.setattr(copies, "GATHER_PIECE_BYTES", 3 * 4096)
        monkeypatch.setattr(copies, "gather_blocks", gather_and_count)
        trace = tmp_path / "trace.jsonl"
        trace.write_text(LINE.replace("[1, 2]", "[1, 2, 3, 4, 5, 6, 7, 8]") * 2)
        assert figures_of(tmp_path, trace)["hits"] == 8
        assert rows == [3, 3, 2]

    def test_a_wrong_byte_is_a_mismatch_and_status_1(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        store = PrefixStore.store

        def store_and_spoil(self, hash_ids, source) -> None:
            store(self, hash_ids, source)
            if 7 in hash_ids:
                (chunk,) = self.chunks([7])
                chunk.tensor.view(torch.int16).reshape(-1)[-1] ^= 1

        monkeypatch.setattr(PrefixStore, "store", store_and_spoil)
        trace = tmp_path / "trace.jsonl"
        trace.write_text(LINE.replace("[1, 2]", "[6, 7, 8]") * 3)
        assert main(["replay", str(trace), "--json", str(tmp_path / "out.json")]) == 1
        assert json.loads((tmp_path / "out.json").read_text())["mismatches"] == 2
        assert "mismatches" in capsys.readouterr().out


class TestEngineLayouts:
    @pytest.mark.parametrize("layout", ENGINE_LAYOUTS)
    def test_made_up_traffic_comes_back_right(self, tmp_path: Path, layout: str) -> None:
        arguments = ("--engine-layout", layout, "--requests", "150", "--heap", "12MiB")
        figures = figures_of(tmp_path, *arguments)
        assert figures["engine_layout"] == layout
        assert figures["hits"] > 100
        assert figures["load_gbps"] > 0
        assert figures["store_gbps"] > 0
        assert "gather_gbps" not in figures

    @pytest.mark.parametrize("geometry", ["small", "small-mla", "small-indexer", "small-opaque"])
    def test_without_an_engine_there_are_no_figures_of_one(
        self, tmp_path: Path, geometry: str
    ) -> None:
        figures = figures_of(tmp_path, "--requests", "150", "--geometry", geometry)
        assert "load_gbps" not in figures
        assert figures["engine_layout"] is None

    def test_the_traffic_is_the_same_as_without_an_engine(self, tmp_path: Path) -> None:
        arguments = ("--requests", "300", "--heap", "3MiB", "--geometry", "small")
        runs = [
            figures_of(tmp_path, *arguments, *more)
            for more in ((), ("--engine-layout", "vllm-flash-hnd"))
        ]
        assert runs[0]["evicted"] > 0
        for name in ("hits", "stored", "resident", "evicted", "utilization_final"):
            assert runs[0][name] == runs[1][name]

    def test_a_real_geometry(self, tmp_path: Path) -> None:
        arguments = ("--geometry", "gpt-oss-20b", "--requests", "2", "--heap", "400MiB")
        figures = figures_of(tmp_path, *arguments, "--engine-layout", "vllm-flashinfer-hnd")
        assert figures["stored"] > 0

    def test_the_help_lists_all(self) -> None:
        words = REPLAY_NOTES.replace(",", " ").split()
        assert not {*ENGINE_LAYOUTS, *POLICIES} - set(words)

    def test_a_wrong_byte_in_the_engine_is_status_1_and_the_layout_is_shown(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write = EngineCache.write

        def write_and_spoil(self, block_ids, chunks) -> None:
            write(self, block_ids, chunks)
            self.tensors[1].view(torch.uint8)[block_ids[0, 0]] ^= 1

        monkeypatch.setattr(EngineCache, "write", write_and_spoil)
        assert main(["replay", "--engine-layout", "mla", "--requests", "20"]) == 1
        shown = capsys.readouterr().out
        assert "mla" in shown
        assert "loaded into the engine" in shown


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}', "hash_ids is missing"),
        (LINE.replace("600", "-1"), "input_length must be non-negative, got -1"),
        (LINE.replace("600", "1.5"), "input_length must be an integer, got 1.5"),
        (LINE.replace("600", "true"), "input_length must be an integer, got true"),
        (LINE.replace("[1, 2]", "7"), "hash_ids must be a list, got 7"),
        (LINE.replace("[1, 2]", '[1, "2"]'), 'must be 64-bit integers, got "2"'),
        (LINE.replace("[1, 2]", f"[{1 << 64}]"), "must be 64-bit integers, got 1844"),
        ("\xff", "not"),
    ],
)
def test_a_malformed_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, reason: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes((LINE + line + "\n").encode("latin-1"))
    assert main(["replay", str(trace)]) == 2
    error = capsys.readouterr().err
    assert f"{trace}, line 2: " in error
    assert reason in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "cannot read nowhere.jsonl: No such file"),
        (["--geometry", "gpt-5"], "unknown geometry 'gpt-5'; known are tiny, "),
        (["--engine-layout", "x"], "unknown engine layout 'x'; known are vllm-flash-nhd, "),
        (
            ["--engine-layout", "mla", "--geometry", "tiny"],
            "geometry tiny does not fit engine layout mla; geometries that fit are small-mla, "
            "deepseek",
        ),
        (
            ["--engine-layout", "indexer", "--geometry", "small-mla"],
            "small-mla does not fit engine layout indexer; geometries that fit are small-indexer",
        ),
        (["--heap", "lots"], "got 'lots'"),
        (["--heap", "0"], "got '0'"),
        (["--heap", "9" * 400], "must be a positive number of bytes such as 64MiB, got '999"),
        (["--heap", "99999999999TiB"], "got '99999999999TiB'"),
        (["--geometry", "llama-3-8b"], "of 64 MiB (llama-3-8b); give --heap 18GiB to keep"),
        (["--heap", "4KiB"], "a heap of 4 KiB is smaller than the request"),
        (["--policy", "fifo"], "unknown policy 'fifo'; known are lru, gdsf, s3fifo, arc"),
        (["--requests", "0"], "--requests must be positive, got 0"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
        (["--json", "/nowhere/out.json"], "cannot write /nowhere/out.json: No such file"),
        (["--plot", "heap.xyz"], "--plot heap.xyz: the name must end in .png, .svg, .pdf"),
        (["--plot", "/nowhere/heap.png"], "cannot write /nowhere/heap.png: No such file"),
        (["--plot", "heap.bmp"], "--plot heap.bmp: the name must end in .png, .svg, .pdf"),
        (["--plot", "heap"], "--plot heap: the name must end in .png, .svg, .pdf"),
        (["--heap", "9999TiB"], "cpu has no room for a heap of 9,999 TiB: give a smaller --heap"),
        pytest.param(
            ["--device", "cuda"],
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs to have no GPU"),
        ),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    if "--plot" in arguments:
        need_matplotlib()
    monkeypatch.chdir(tmp_path)
    is_the_machines = "no room for" in message or "no CUDA" in message
    assert main(["replay", *arguments]) == (3 if is_the_machines else 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_picture_without_matplotlib_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["replay", "nowhere.jsonl", "--plot", "heap.png"]) == 3
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err


def test_a_refused_replay_leaves_files_as_they_were(tmp_path: Path) -> None:
    need_matplotlib()
    new, old = tmp_path / "new.json", tmp_path / "old.png"
    old.write_text("kept")
    assert main(["replay", "--heap", "4KiB", "--json", str(new), "--plot", str(old)]) == 2
    assert not new.exists()
    assert old.read_text() == "kept"


def test_control_c_ends_with_one_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Replay, "serve", interrupt)
    assert main(["replay"]) == 130
    assert capsys.readouterr().err == "kvheap replay: interrupted\n"


def test_an_empty_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.jsonl").touch()
    assert main(["replay", str(tmp_path / "trace.jsonl")]) == 2
    assert "holds no request" in capsys.readouterr().err


def test_sizes_have_units() -> None:
    assert parse_bytes("9007199254740993") == 9007199254740993, "more than a float can tell apart"
    sizes = {"1": 1, "2kB": 2000, "1.5KiB": 1536, "3 MiB": 3 << 20, "1g": 10**9, "1TiB": 1 << 40}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "-1", "1XB", "1..5MB"):
        with pytest.raises(CommandError):
            parse_bytes(text)


def test_the_command_explains_itself_without_torch() -> None:
    code = (
        "import sys, kvheap.cli\n"
        "try: kvheap.cli.main(['replay', '--help'])\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("--heap", "--plot", "llama-3-8b", "exit status"):
        assert word in done.stdout


def test_it_runs_as_a_module_without_torch() -> None:
    """``python -m kvheap``. The process is small; what it runs is tested in this one."""
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('kvheap', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
    )
    version = [sys.executable, "-c", code, "--version"]
    done = subprocess.run(version, capture_output=True, text=True, check=True)
    assert done.stdout == f"kvheap {__version__}\n"


def test_the_module_runs_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kvheap", "replay", "--requests", "20"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("kvheap", run_name="__main__")
    assert stop.value.code == 0
    assert "mismatches" in capsys.readouterr().out


def test_the_trace_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(LINE)
    assert main(["replay", str(trace), "--json", str(trace)]) == 2
    assert "is the trace itself" in capsys.readouterr().err
    assert trace.read_text() == LINE
