"""The loop of a bulk copy, in PTX: ``cp.async.bulk`` from global to shared memory and back.

Triton has no operation for bulk copies between pointers, so the whole loop is one statement of
inline PTX, which declares the shared memory that it uses. One warp executes it.

**Memory.** Shared memory starts with one mbarrier for each stage, followed by 16 bytes for each
slot, the target and the size of its item. The slots follow, ``stage_items`` for each stage, so that
an item that is aligned to 128 bytes at its source is so here.

**Items.** An item is a row, or a part of one that fits a slot. Lane ``i`` of the warp holds item
``i`` of a batch: where it is read, where it is written, and its bytes. The descriptors of the next
batch are on their way meanwhile. ``stage_items`` consecutive lanes fill a stage, each with its own
item.

**Order.** Item bytes arrive in a slot by a bulk copy that counts them on the stage's mbarrier, to
which each of the ``stage_items`` lanes also arrives. All lanes wait for the phase of the mbarrier,
then the same lanes start the bulk copies to the targets. A stage is filled again once the copies
from it have been read, which each lane waits for itself, followed by a barrier of the warp: the
next item of a slot may be another lane's. ``draining`` stages may still be read while the next ones
are being filled. All other stages are in flight from their sources. Before a lane ends, the bytes
that it copied have been written, not only read.

Bulk copies belong to the async proxy. A fence orders the initialisation of the mbarriers before
them. The items themselves are only accessed by bulk copies, so they need no other fence, nor do
targets and sizes, which are only accessed by ordinary loads and stores (PTX ISA 8.7, "Async
proxy").
"""

from __future__ import annotations

__all__ = ["MAX_STAGES", "SLOT_HEAD_BYTES", "bulk_loop"]

MAX_STAGES = 32
"""Most stages: as many mbarriers, each initialised by a lane."""

SLOT_HEAD_BYTES = 16
"""Bytes of the target and the size of a slot's item."""

# What a lane does to find the item ``item`` of all: the addresses of its row, which are not waited
# for, the offset of the item in it, and its bytes. If rows differ, these are the bytes of the row.
# If there is no such item, they are 0.
_FETCH = """
    setp.lt.u32     has_item, item, {num_items};
    and.pred        has_item, has_item, in_batch;
    div.u32         row, item, {cols};
    mul.lo.u32      col, row, {cols};
    sub.u32         col, item, col;
    mul.wide.u32    next_offset, col, {item_bytes};
    add.u32         col, col, 1;
    setp.eq.u32     is_last, col, {cols};
    selp.b32        next_bytes, {last_bytes}, {item_bytes}, is_last;
    selp.b32        next_bytes, next_bytes, 0, has_item;
    mul.wide.u32    place, row, 8;
    add.u64         place, place, {descriptors};
    mov.u64         next_source, 0;
    mov.u64         next_target, 0;
    @has_item ld.global.b64 next_source, [place];
    add.u64         place, place, array_bytes;
    @has_item ld.global.b64 next_target, [place];
    add.u64         place, place, array_bytes;
    and.pred        has_size, has_item, is_ragged;
    @has_size ld.global.b32 next_bytes, [place];
"""

# Makes the next batch the current one. If rows differ, an item has what is left of its row.
_PROMOTE = """
    cvt.u32.u64     col, next_offset;
    selp.b32        col, col, 0, is_ragged;
    sub.s32         next_bytes, next_bytes, col;
    max.s32         next_bytes, next_bytes, 0;
    min.s32         next_bytes, next_bytes, {item_bytes};
    add.u64         source, next_source, next_offset;
    add.u64         target, next_target, next_offset;
    cvt.u64.u32     bytes, next_bytes;
    add.u32         item, item, {item_step};
"""

_LOOP = """{{
    .shared .align 128 .b8 bulk_memory[{shared_bytes}];
    .reg .pred      done, wraps, in_batch, has_item, is_last, is_ragged, has_size, owns, copies;
    .reg .b32       lane, bars, data, fill, fill_bar, drain, drain_bar, end_bar, parity;
    .reg .b32       pending, left, first_fill, first_drain, slot, head, stage_bytes;
    .reg .b32       heads, fill_heads, drain_heads, stage_heads;
    .reg .b32       item, row, col, next_bytes, size;
    .reg .b64       source, target, bytes, next_source, next_target, next_offset;
    .reg .b64       place, length, array_bytes;

    mov.u32         lane, %tid.x;
    mov.u32         bars, bulk_memory;
    add.u32         heads, bars, {bar_bytes};
    add.u32         data, bars, {first_slot};
    shl.b32         end_bar, {stages}, 3;
    add.u32         end_bar, end_bar, bars;
    mul.lo.u32      stage_bytes, {slot_bytes}, {stage_items};
    mul.lo.u32      stage_heads, {stage_items}, {head_bytes};
    mul.wide.u32    array_bytes, {num_rows}, 8;
    setp.eq.u32     is_ragged, {last_bytes}, 0;
    setp.lt.u32     in_batch, lane, {batch_items};

    mad.lo.u32      fill_bar, lane, 8, bars;
    setp.lt.u32     owns, lane, {stages};
    @owns mbarrier.init.shared::cta.b64 [fill_bar], {stage_items};
    fence.proxy.async.shared::cta;
    bar.warp.sync   0xffffffff;

    mov.u32         fill, data;
    mov.u32         fill_heads, heads;
    mov.u32         fill_bar, bars;
    mov.u32         first_fill, 0;
    mov.u32         drain, data;
    mov.u32         drain_heads, heads;
    mov.u32         drain_bar, bars;
    mov.u32         first_drain, 0;
    mov.u32         parity, 0;
    mov.u32         pending, 0;
    mov.u32         left, {num_tiles};
    add.u32         item, {first_item}, lane;
    {fetch}
    {promote}
    {fetch}

bulk_fill:
    setp.eq.u32     done, left, 0;
    @done bra       bulk_drain;
    sub.u32         slot, lane, first_fill;
    setp.lt.u32     owns, slot, {stage_items};
    setp.ne.u64     copies, bytes, 0;
    and.pred        copies, copies, owns;
    mad.lo.u32      head, slot, {head_bytes}, fill_heads;
    mad.lo.u32      slot, slot, {slot_bytes}, fill;
    cvt.u32.u64     size, bytes;
    @owns st.shared.v2.b64 [head], {{target, bytes}};
    @owns mbarrier.arrive.expect_tx.shared::cta.b64 _, [fill_bar], size;
    @copies cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
                    [slot], [source], size, [fill_bar];
    add.u32         fill, fill, stage_bytes;
    add.u32         fill_heads, fill_heads, stage_heads;
    add.u32         fill_bar, fill_bar, 8;
    setp.eq.u32     wraps, fill_bar, end_bar;
    @wraps mov.u32  fill, data;
    @wraps mov.u32  fill_heads, heads;
    @wraps mov.u32  fill_bar, bars;
    sub.u32         left, left, 1;
    add.u32         pending, pending, 1;
    add.u32         first_fill, first_fill, {stage_items};
    setp.lt.u32     done, first_fill, {batch_items};
    @done bra       bulk_same_batch;
    mov.u32         first_fill, 0;
    {promote}
    {fetch}
bulk_same_batch:
    setp.lt.u32     done, pending, {ahead};
    @done bra       bulk_fill;

bulk_drain:
    setp.eq.u32     done, pending, 0;
    @done bra       bulk_end;
bulk_wait:
    mbarrier.try_wait.parity.shared::cta.b64 done, [drain_bar], parity;
    @!done bra      bulk_wait;
    sub.u32         slot, lane, first_drain;
    setp.lt.u32     owns, slot, {stage_items};
    mad.lo.u32      head, slot, {head_bytes}, drain_heads;
    mad.lo.u32      slot, slot, {slot_bytes}, drain;
    mov.u64         place, 0;
    mov.u64         length, 0;
    @owns ld.shared.v2.b64 {{place, length}}, [head];
    setp.ne.u64     copies, length, 0;
    cvt.u32.u64     size, length;
    @copies cp.async.bulk.global.shared::cta.bulk_group [place], [slot], size;
    cp.async.bulk.commit_group;
    add.u32         drain, drain, stage_bytes;
    add.u32         drain_heads, drain_heads, stage_heads;
    add.u32         drain_bar, drain_bar, 8;
    setp.eq.u32     wraps, drain_bar, end_bar;
    @wraps mov.u32  drain, data;
    @wraps mov.u32  drain_heads, heads;
    @wraps mov.u32  drain_bar, bars;
    @wraps xor.b32  parity, parity, 1;
    sub.u32         pending, pending, 1;
    add.u32         first_drain, first_drain, {stage_items};
    setp.eq.u32     wraps, first_drain, {batch_items};
    @wraps mov.u32  first_drain, 0;
    cp.async.bulk.wait_group.read {draining};
    bar.warp.sync   0xffffffff;
    bra             bulk_fill;

bulk_end:
    cp.async.bulk.wait_group 0;
    mov.u32         $0, 0;
}}"""


_OPERANDS = (
    "descriptors",
    "num_rows",
    "num_items",
    "cols",
    "item_bytes",
    "last_bytes",
    "stage_items",
    "batch_items",
    "stages",
    "slot_bytes",
    "first_slot",
    "first_item",
    "item_step",
    "num_tiles",
    "ahead",
)
"""What the loop is given, in this order: an address, then 32-bit integers."""


def bulk_loop(shared_bytes: int, draining: int) -> str:
    """The inline PTX of the loop.

    Args:
        shared_bytes: bytes of shared memory that it declares.
        draining: stages that may still be read by copies to the targets.
    """
    operands = {name: f"${at}" for at, name in enumerate(_OPERANDS, start=1)}
    return _LOOP.format(
        fetch=_FETCH.format(**operands),
        promote=_PROMOTE.format(**operands),
        shared_bytes=shared_bytes,
        draining=draining,
        bar_bytes=8 * MAX_STAGES,
        head_bytes=SLOT_HEAD_BYTES,
        **operands,
    )
