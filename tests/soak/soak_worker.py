"""One thread of the soak: the batches that it holds, and how it gives them up."""

from __future__ import annotations

import random
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from soak_checks import SoakError, holds, require
from soak_world import LAYOUTS, Cycle, Holding, World

from kvheap import MemoryBatch, MemoryObj
from kvheap.blocks.block_layout import BlockLayout

MAX_HOLDINGS = 24

Operation: TypeAlias = "Callable[[Worker], None]"


class Worker:
    """One thread: random operations, each of which knows what must come of it.

    Here is what the operations share: to allocate and fill a batch, to choose one or one of its
    blocks, and to give a batch up in one of many ways.

    Args:
        world: the heap, and who else is at it.
        seed: of everything that the thread tries.
        operations: what it does, and how often.
    """

    def __init__(self, world: World, seed: str, operations: Mapping[Operation, int]) -> None:
        self.world = world
        self.heap = world.heap
        self.random = random.Random(seed)
        self.operations = operations
        self.counts = Counter[str]()
        self.holdings: list[Holding] = []

    def run(self) -> None:
        """Work until the world stops, or until something is not as it must be."""
        self.world.faults.strike_here(self.random)
        operations, weights = list(self.operations), list(self.operations.values())
        while not self.world.stopping.is_set():
            operation = self.random.choices(operations, weights)[0]
            try:
                operation(self)
            except Exception:
                self.world.report(f"in {operation.__name__}:\n{traceback.format_exc()}")
                return
            self.counts["operations"] += 1
            self.counts[f"  {operation.__name__.replace('_', ' ')}"] += 1

    def give_all_up(self) -> None:
        """At the end, in the main thread: free half of what is held, drop the rest."""
        for holding in self.holdings[::2]:
            holding.check(holding.live)
            self.heap.batched_free([holding.batch[row] for row in holding.live])
            self.counts["blocks freed"] += len(holding.live)
        self.holdings.clear()

    # -- get -----------------------------------------------------------------------------------

    def new_batch(self, max_blocks: int) -> Holding | None:
        """A batch, partial or whole, filled or not; None if the heap is full or a copy failed."""
        layout = self.random.choice(LAYOUTS)
        num_blocks = self.random.randint(0, max_blocks)
        values = self.fresh_values(num_blocks)
        source = source_of(layout, values) if self.random.random() < 0.5 else None
        partial = self.random.random() < 0.3
        try:
            batch = self.heap.batched_allocate(
                layout.shapes, layout.dtypes, num_blocks, layout.fmt, source, partial
            )
        except SoakError:
            require(source is not None, "nothing was to be copied")
            self.counts["failed: scatter"] += 1
            return None
        if batch is None:
            require(not partial, "a partial batch was refused")
            self.make_room()
            return None
        require(partial or len(batch) == num_blocks, f"{num_blocks} blocks wanted, got {batch!r}")
        self.counts["partial batches"] += len(batch) < num_blocks
        return self.adopt(batch, values[: len(batch)], is_filled=source is not None)

    def adopt(self, batch: MemoryBatch, values: torch.Tensor, is_filled: bool) -> Holding:
        """Count the blocks, and fill them unless that is done."""
        self.counts["blocks born"] += len(batch)
        holding = Holding(batch, values, list(range(len(batch))))
        if is_filled:
            return holding
        for row, obj in enumerate(batch):
            block = obj.raw_tensor
            assert block is not None
            if self.world.options.get("scrub"):
                require(holds(block, 0), f"{obj!r} was allocated unscrubbed")
            block.fill_(holding.value(row))
        return holding

    def keep(self, holding: Holding) -> None:
        """Hold a batch; give up others if they are too many."""
        self.holdings.append(holding)
        while len(self.holdings) > MAX_HOLDINGS:
            self.give_up(self.take_holding())

    def make_room(self) -> None:
        """Give up some batches, since the heap is full."""
        self.counts["failed: full"] += 1
        for _ in range(min(4, len(self.holdings))):
            self.give_up(self.take_holding())

    def fresh_values(self, num_blocks: int) -> torch.Tensor:
        """A value for each block: neither zero nor poison."""
        first = self.random.randrange(200)
        return ((torch.arange(num_blocks) * 7 + first) % 200 + 1).to(torch.uint8)

    # -- choose --------------------------------------------------------------------------------

    def take_holding(self) -> Holding:
        """Any batch; it is no longer held."""
        return self.holdings.pop(self.random.randrange(len(self.holdings)))

    def some_holding(self) -> Holding | None:
        """A batch that has live blocks, if there is one."""
        found = [holding for holding in self.holdings if holding.live]
        return self.random.choice(found) if found else None

    def some_row(self) -> tuple[Holding, int] | None:
        """A live block that may be given up by itself, if there is one."""
        found = [holding for holding in self.holdings if holding.live and not holding.only_whole]
        if not found:
            return None
        holding = self.random.choice(found)
        return holding, self.random.choice(holding.live)

    # -- give up -------------------------------------------------------------------------------

    def gone(self, holding: Holding, rows: Sequence[int]) -> None:
        """Note that these blocks were freed."""
        gone = set(rows)
        holding.live = [row for row in holding.live if row not in gone]
        self.counts["blocks freed"] += len(gone)
        for row in gone:
            require(holding.batch[row].tensor is None, "a freed block has a tensor")
        holding.check_counts()

    def give_up(self, holding: Holding) -> None:
        """Free all that is left of a batch, in one of many ways."""
        holding.check(holding.live)
        if not holding.live:
            return
        is_whole = len(holding.live) == len(holding.batch)
        ways = [self.free_rows, self.free_rows_with_out, self.drop]
        if is_whole:
            ways += [self.free_whole, self.free_whole_with_out, self.detach]
        if not holding.only_whole:
            ways += [self.lower_every_count]
        self.random.choice(ways)(holding)

    def free_whole(self, holding: Holding) -> None:
        """Free the batch itself."""
        self.heap.batched_free(holding.batch)
        self.gone(holding, holding.live)

    def free_whole_with_out(self, holding: Holding) -> None:
        """Free the batch itself, and gather its bytes."""
        self.free_into_out(holding, holding.batch, holding.live)

    def free_rows(self, holding: Holding) -> None:
        """Free the blocks in any order."""
        rows = self.random.sample(holding.live, len(holding.live))
        self.heap.batched_free(holding.batch[row] for row in rows)
        self.gone(holding, rows)

    def free_rows_with_out(self, holding: Holding) -> None:
        """Free the blocks in any order, and gather their bytes."""
        rows = self.random.sample(holding.live, len(holding.live))
        self.free_into_out(holding, [holding.batch[row] for row in rows], rows)

    def free_into_out(
        self, holding: Holding, objs: MemoryBatch | list[MemoryObj], rows: Sequence[int]
    ) -> None:
        """Free and gather; where the copy fails, everything must still be held."""
        out = torch.zeros_like(source_of(holding.batch.layout, holding.values[list(rows)]))
        try:
            self.heap.batched_free(objs, out=out)
        except SoakError:
            self.counts["failed: gather"] += 1
            holding.check_counts()
            holding.check(holding.live)
            self.holdings.append(holding)
            return
        want = source_of(holding.batch.layout, holding.values[list(rows)])
        got = out.reshape(len(rows), -1).view(torch.uint8)
        require(torch.equal(got, want.reshape(len(rows), -1).view(torch.uint8)), "wrong bytes")
        self.gone(holding, rows)

    def lower_every_count(self, holding: Holding) -> None:
        """Drop the last reference of each block."""
        for row in list(holding.live):
            holding.batch[row].ref_count_down()
            self.gone(holding, [row])

    def detach(self, holding: Holding) -> None:
        """Free by address, which neither waits for streams nor scrubs."""
        if holding.has_streams or self.world.options.get("scrub"):
            self.free_whole(holding)
            return
        self.heap.address_manager.batched_free(holding.batch.detach())
        self.gone(holding, holding.live)

    def drop(self, holding: Holding) -> None:
        """Forget a batch without freeing it: at once, by a handle, or as cyclic garbage."""
        way = self.random.randrange(3)
        if way == 1:
            handle = holding.batch[self.random.choice(holding.live)]
            del holding.batch
            require(handle.is_valid(), "a handle does not keep its batch")
        elif way == 2:
            Cycle(holding)
        self.counts["drops"] += 1


def source_of(layout: BlockLayout, values: torch.Tensor) -> torch.Tensor:
    """What a batch with these values is filled from: ``[len(values), *shape]``, or bytes."""
    content = values[:, None].repeat(1, layout.size_bytes)
    if len(layout.shapes) > 1:
        return content
    return content.view(layout.dtypes[0]).view(len(values), *layout.shapes[0])
