"""Chunks of another process: a read by key, beside NIXL with the same descriptors.

Another process has a heap in host memory and a ``Node`` with chunks under keys; this one reads them
into blocks of a heap of its own. Once over shared memory, once over TCP on loopback:

==============  ==================================================================================
method          what it does
==============  ==================================================================================
kvheap          ``peer.read(keys, into=batch).transfer.result()``: asks the peer for a lease and its
                addresses, merges neighbours, reads, checks the lease, returns it. NIXL alone asks
                nobody: the question and its answer, two messages over TCP, are this method's alone
kvheap, leased  ``peer.read(lease, into=batch).transfer.result()``, with a lease that was taken
                before, as by an engine that looks up first: it knows what NIXL alone knows, merges
                neighbours, reads and checks the lease. Taking and releasing it does not count; it
                is what "kvheap" does more
nixl            NIXL alone, on a thread that does nothing else: a request with the same descriptors,
                addresses known before; created, posted, and asked without a pause until it is done.
                Its tables of descriptors are made before, and do not count
nixl, blocks    the same with one descriptor for each block
==============  ==================================================================================

Cases: *one run*, of neighbours on both sides; *runs of 8*, neighbours in groups of 8 on both sides;
*lone*, no two are neighbours. Ratios are medians over interleaved rounds, of NIXL's time over
kvheap's; microseconds are differences of medians. Before each call, its thread does nothing for
1 ms but let others go first, who end what they do for the call before. Loopback of one machine says
nothing about a network, and both processes share its cores.

Every row of ``targets`` says what was asked, the worst figure, and whether it was reached, for each
of the two methods. "Merging" is against *nixl, blocks*; NIXL's own gain with the merged descriptors
is in its row, and no read can merge for more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from _report import Row, describe_machine, make_console, parse_common, write_results
from _timing import Measure, Samples, time_in_rounds
from rich.console import Console
from rich.table import Table

from kvheap import HostMemoryAllocator, MemoryBatch, MemoryFormat
from kvheap.kernels.pieces import Pieces
from kvheap.remote import Node, Peer
from kvheap.transfer.pairing import paired_runs

PAUSE_S = 1e-3
"""Seconds before each call, awake: to wake up from a sleep takes as long as NIXL does."""

LEASE_S = 60.0
RENEWED_S = 20.0
"""Seconds before its end at which a lease is taken anew, between two rounds."""

TRANSPORTS = {"shared memory": "shm,self,tcp", "tcp": "tcp,self"}
"""What UCX may use, by the name of the case. Control and wire-up need TCP in both."""


@dataclass(frozen=True, slots=True)
class Case:
    """Blocks to read: their number, bytes, and how many neighbours are together; 0: all."""

    num_blocks: int
    block_bytes: int
    run: int

    @property
    def name(self) -> str:
        """For tables."""
        pattern = {0: "one run", 1: "lone"}.get(self.run, f"runs of {self.run}")
        size = self.num_blocks * self.block_bytes
        total = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        return f"{total}: {self.num_blocks} x {self.block_bytes >> 10} KiB, {pattern}"

    def heap(self) -> HostMemoryAllocator:
        """A heap that has room for the blocks and what lies between them."""
        between = 0 if not self.run else -(-self.num_blocks // self.run)
        return HostMemoryAllocator((self.num_blocks + between) * self.block_bytes)

    def batch(self, heap: HostMemoryAllocator) -> tuple[MemoryBatch, Any]:
        """The blocks, and what lies between them."""
        between = None
        if self.run:
            count = self.num_blocks + -(-self.num_blocks // self.run)
            whole = heap.batched_allocate([self.block_bytes], torch.uint8, count)
            assert whole is not None
            rows = np.arange(count) % (self.run + 1)
            heap.batched_free([whole[int(row)] for row in np.flatnonzero(rows < self.run)])
            between = whole
        batch = heap.batched_allocate(
            [self.block_bytes], torch.uint8, self.num_blocks, MemoryFormat.UNDEFINED
        )
        assert batch is not None
        return batch, between

    def keys(self) -> list[bytes]:
        """One for each block."""
        return [row.to_bytes(8, "big") for row in range(self.num_blocks)]


def cases(quick: bool) -> list[Case]:
    """What is measured."""
    large = [(64, 0)] if quick else [(64, 0), (256, 0), (1024, 0)]
    return [
        Case(1, 4 << 10, 0),
        Case(1, 64 << 10, 0),
        *[Case(mib * 16, 64 << 10, run) for mib, run in large],
        Case(16_384, 4 << 10, 8),
        Case(16_384, 4 << 10, 1),
    ]


# -- the other process -----------------------------------------------------------------------------


def serve(case: Case) -> None:
    """Publish the blocks of a case, say where they are, and wait for the end of the input."""
    heap = case.heap()
    batch, between = case.batch(heap)
    heap.buffer.copy_(torch.arange(heap.buffer.numel() // 8).view(torch.uint8))
    with Node("owner", heap) as node:
        node.publish(case.keys(), batch)
        runs = batch.block_runs()
        print(json.dumps([node.address, runs.starts.tolist(), runs.counts.tolist()]), flush=True)
        sys.stdin.read()
    del between


@contextmanager
def owner(case: Case, transports: str) -> Iterator[list[Any]]:
    command = [
        sys.executable,
        __file__,
        "--serve",
        json.dumps([case.num_blocks, case.block_bytes, case.run]),
    ]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, UCX_TLS=transports),
    ) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.kill()


# -- NIXL alone ------------------------------------------------------------------------------------


class Raw:
    """A NIXL agent beside the node's, with the reader's heap registered."""

    def __init__(self, heap: HostMemoryAllocator, peer: Peer) -> None:
        import nixl._bindings as nixl

        self.nixl = nixl
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.syncMode = True, nixl.NIXL_THREAD_SYNC_STRICT
        config.pthrDelay = 100_000
        self.agent = nixl.nixlAgent(f"raw-{time.time_ns()}", config)
        self.agent.createBackend("UCX", {})
        (segment,) = heap.memory_segments()
        self.memory = nixl.nixlRegDList(nixl.DRAM_SEG, [(segment.base, segment.num_bytes, 0, "")])
        self.agent.registerMem(self.memory, [])
        self.peer = peer.link.welcome.agent
        self.agent.loadRemoteMD(peer.link.welcome.metadata)

    def read(self, sources: Any, targets: Any, sizes: Any) -> float:
        """Microseconds of one request; creating its tables of addresses does not count."""
        tables = []
        for starts in (targets, sources):
            table = np.zeros((len(starts), 3), np.uint64)
            table[:, 0], table[:, 1] = starts, sizes
            tables.append(table)
        nixl, agent = self.nixl, self.agent
        began = time.perf_counter()
        here, there = (nixl.nixlXferDList(nixl.DRAM_SEG, table) for table in tables)
        request = agent.createXferReq(nixl.NIXL_READ, here, there, self.peer, "", [])
        state = agent.postXferReq(request, "")
        while state == nixl.NIXL_IN_PROG:
            state = agent.getXferStatus(request)
        seconds = time.perf_counter() - began
        assert state == nixl.NIXL_SUCCESS, state
        agent.releaseXferReq(request)
        return seconds * 1e6

    def close(self) -> None:
        """End the agent."""
        self.agent.invalidateRemoteMD(self.peer)
        self.agent.deregisterMem(self.memory, [])
        del self.agent


# -- measure ---------------------------------------------------------------------------------------


def let_others_end() -> None:
    """Pause, awake, so that the threads of the call before are done."""
    end = time.perf_counter() + PAUSE_S
    while time.perf_counter() < end:
        time.sleep(0)


def measure(case: Case, transport: str, rounds: int) -> list[Row]:
    heap = case.heap()
    batch, between = case.batch(heap)
    keys = case.keys()
    with (
        owner(case, TRANSPORTS[transport]) as (address, starts, counts),
        Node("reader", heap) as node,
    ):
        peer = node.connect(address)
        raw = Raw(heap, peer)
        there = type(batch.block_runs())(
            np.array(starts), np.array(counts), case.block_bytes, case.block_bytes
        )
        pieces = paired_runs(there, batch.block_runs())
        blocks = pieces.cut(case.block_bytes)

        leases = [peer.lease(keys, LEASE_S)]
        returns: dict[str, list[float]] = {"kvheap": [], "kvheap, leased": []}

        def read(method: str, wanted: Any) -> float:
            let_others_end()
            began = time.perf_counter()
            peer.read(wanted, into=batch)
            returns[method].append((time.perf_counter() - began) * 1e6)
            assert batch.transfer is not None
            batch.transfer.result()
            return (time.perf_counter() - began) * 1e6

        def leased() -> float:
            if leases[-1].left_s < RENEWED_S:
                leases.pop().release()
                leases.append(peer.lease(keys, LEASE_S))
            return read("kvheap, leased", leases[-1])

        def alone(of: Pieces) -> float:
            let_others_end()
            return raw.read(of.sources, of.targets, of.size_array())

        methods: dict[str, Measure] = {
            "kvheap": lambda: read("kvheap", keys),
            "kvheap, leased": leased,
            "nixl": lambda: alone(pieces),
        }
        if case.run > 1:
            methods["nixl, blocks"] = lambda: alone(blocks)
        found = time_in_rounds(methods, rounds)
        leases.pop().release()
        raw.close()
    del between
    base = {
        "case": case.name,
        "transport": transport,
        "bytes": case.num_blocks * case.block_bytes,
        "blocks": case.num_blocks,
        "run": case.run,
    }
    rows: list[Row] = []
    for method, samples in found.items():
        row: Row = {**base, "method": method, "descriptors": len(pieces), **samples.percentiles()}
        if method in returns:
            row["returns_us"] = round(Samples(tuple(returns[method][1:])).percentile(50), 1)
            row["us_over_nixl"] = round(row["p50_us"] - found["nixl"].percentile(50), 1)
        if method != "nixl, blocks":
            row["speed_of_nixl"] = round(samples.speed_against(found["nixl"]), 3)
            if "nixl, blocks" in found:
                row["merging"] = round(samples.speed_against(found["nixl, blocks"]), 2)
        rows.append(row)
    return rows


# -- report ----------------------------------------------------------------------------------------


def target(what: str, asked: float, rows: list[Row], figure: str, *, is_least: bool) -> Row:
    """A target with the worst of the figures that it is for, which must be at least or at most."""
    if not rows:
        return {"target": what, "asked": asked, "worst": None, "where": "", "reached": None}
    worst = (min if is_least else max)(rows, key=lambda row: row[figure])
    within = sum(row[figure] >= asked if is_least else row[figure] <= asked for row in rows)
    return {
        "target": what,
        "asked": asked,
        "worst": worst[figure],
        "where": f"{worst['case']}, {worst['transport']}",
        "reached": within == len(rows),
        "rows_within": f"{within} of {len(rows)}",
    }


def targets_of(rows: list[Row]) -> list[Row]:
    """Each target, for reads by keys and by leases."""
    found = []
    for method in ("kvheap", "kvheap, leased"):
        own = [row for row in rows if row["method"] == method]
        small = [row for row in own if row["bytes"] < 1 << 20]
        large = [row for row in own if row["bytes"] >= 64 << 20 and row["run"] == 0]
        lone = [row for row in own if row["run"] == 1]
        shared = [row for row in large if row["transport"] != "tcp"]
        tcp = [row for row in large if row["transport"] == "tcp"]
        merged = [row for row in own if "merging" in row]
        runs = [row for row in own if row["run"] != 1]
        found += [
            target(f"{method}: share of nixl, shm", 0.95, shared, "speed_of_nixl", is_least=True),
            target(f"{method}: share of nixl, tcp", 0.85, tcp, "speed_of_nixl", is_least=True),
            target(f"{method}: share of nixl, lone", 0.85, lone, "speed_of_nixl", is_least=True),
            target(f"{method}: us over nixl", 60.0, small, "us_over_nixl", is_least=False),
            target(f"{method}: merging", 2.0, merged, "merging", is_least=True),
            target(f"{method}: read() returns, us", 1000.0, runs, "returns_us", is_least=False),
            target(f"{method}: lone returns, us", 5000.0, lone, "returns_us", is_least=False),
        ]
    return found


def print_targets(console: Console, targets: list[Row]) -> None:
    for each in targets:
        verdict = {True: "reached", False: "NOT reached", None: "not measured"}[each["reached"]]
        worst = "" if each["worst"] is None else f"; worst {each['worst']} ({each['where']})"
        within = f", {each['rows_within']} within" if each["worst"] is not None else ""
        console.print(f"{each['target']}, asked {each['asked']:g}: {verdict}{within}{worst}")


def print_rows(console: Console, rows: list[Row]) -> None:
    table = Table(title="reads from another process (microseconds: p50)")
    names = ("case", "transport", "method", "time", "nixl", "share", "us over", "merging", "read()")
    for name in names:
        table.add_column(name, justify="left" if name in names[:3] else "right")
    alone = {(row["case"], row["transport"]): row for row in rows if row["method"] == "nixl"}
    for row in rows:
        if "returns_us" in row:
            nixl = alone[row["case"], row["transport"]]
            table.add_row(
                row["case"],
                row["transport"],
                row["method"],
                f"{row['p50_us']:,.0f}",
                f"{nixl['p50_us']:,.0f}",
                f"{row['speed_of_nixl']:.2f}",
                f"{row['us_over_nixl']:,.0f}",
                f"{row['merging']:.1f}x of {nixl['merging']:.1f}x" if "merging" in row else "",
                f"{row['returns_us']:,.0f}",
            )
    console.print(table)


def draw(plt: ModuleType, path: Path, found: dict[str, Any]) -> None:
    """The speed of each case beside NIXL alone, by keys and by a lease, over both transports."""
    rows: list[Row] = found["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows if "us_over_nixl" in row))
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = plt.subplots(1, len(TRANSPORTS), figsize=(13, 4), sharey=True)
    for panel, transport in zip(panels, TRANSPORTS, strict=True):
        for offset, method in enumerate(methods):
            shares = [
                row["speed_of_nixl"]
                for row in rows
                if (row["method"], row["transport"]) == (method, transport)
            ]
            places = np.arange(len(names)) + (offset - 0.5) * 0.35
            panel.barh(places, shares, 0.33, label=method)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(transport)
        panel.set_xlabel("speed as a share of NIXL alone, same descriptors")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].legend()
    figure.suptitle(f"reads from another process, {found['device']}, {found['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(Case(*json.loads(sys.argv[2])))
        return
    assert __doc__ is not None
    arguments = parse_common(__doc__.splitlines()[0], draw)
    console = make_console()
    rows: list[Row] = []
    for case in cases(arguments.quick):
        size = case.num_blocks * case.block_bytes
        rounds = 5 if arguments.quick else 200 if size < 1 << 20 else 15 if size < 1 << 30 else 7
        for transport in TRANSPORTS:
            rows += measure(case, transport, rounds)
    targets = targets_of(rows)
    print_rows(console, rows)
    print_targets(console, targets)
    machine = describe_machine(torch.device("cpu"))
    load = [round(each, 1) for each in os.getloadavg()]
    configuration = {"nixl": "1.5.1", "quick": arguments.quick, "load_average": load}
    write_results(
        console,
        arguments.out,
        "remote",
        machine,
        configuration,
        {"targets": targets, "rows": rows},
        draw,
    )


if __name__ == "__main__":
    main()
