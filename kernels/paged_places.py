"""How kernels look up where a token is in a paged cache, and how they report a bad place.

A token's place is a slot or the id of its block. A kernel that finds a place out of range skips the
token and reports it in the cache's error word, because a check on the host would have to wait for
the device. A report has the token's number in its high 32 bits, and its place plus 2**31 in its low
32 bits. The word keeps the smallest report, which is that of the lowest such token.
"""

from __future__ import annotations

from kvheap.kernels.arrays import INT32_END, INT64_END
from kvheap.kernels.launch import jit, tl
from kvheap.kernels.tiles import quotient

__all__ = ["NO_REPORT", "locate_tokens", "read_report", "report_bad_places"]

NO_REPORT = INT64_END - 1
"""The error word if every place was in range."""


@jit()
def locate_tokens(  # type: ignore[no-untyped-def]
    place_ptr,
    place_start,
    place_bytes,
    place_limit,
    token,
    is_token,
    unit,
    unit_magic,
    unit_shift,
    block_size,
    block_magic,
    block_shift,
):
    """The place, the block and the offset in the block of each token, and whether it is in range.

    ``place_ptr`` has slots, if ``unit`` is 1, or block ids, if ``unit`` is ``block_size``; they are
    int64 from number ``place_start`` on, or int32, as ``place_bytes`` says.
    """
    at = quotient(token, unit_magic, unit_shift)
    is_wide = is_token & (place_bytes == 8)
    is_narrow = is_token & (place_bytes != 8)
    wide = place_ptr.to(tl.pointer_type(tl.int64)) + place_start + at
    narrow = place_ptr.to(tl.pointer_type(tl.int32)) + place_start + at
    place = tl.load(wide, mask=is_wide, other=0)
    place += tl.load(narrow, mask=is_narrow, other=0).to(tl.int64)
    is_inside = is_token & (place >= 0) & (place < place_limit)
    slot = tl.where(is_inside, place, 0).to(tl.int32) * unit + (token - at * unit)
    block = quotient(slot, block_magic, block_shift)
    return place, block, slot - block * block_size, is_inside


@jit()
def report_bad_places(error_ptr, token, is_token, place, is_inside):  # type: ignore[no-untyped-def]
    """Write the tokens that are neither skipped nor in range to the error word."""
    near = tl.minimum(tl.maximum(place, -2147483648), 2147483647)
    report = token.to(tl.int64) * 4294967296 + (near + 2147483648)
    is_bad = is_token & (place != -1) & (is_inside == 0)
    tl.atomic_min(error_ptr + token * 0, report, mask=is_bad)


def read_report(error_word: int) -> tuple[int, int]:
    """The token that an error word reports, and its place, limited to 32 bits.

    >>> read_report((7 << 32) + 20 + (1 << 31))
    (7, 20)
    """
    token, low = divmod(error_word, 2 * INT32_END)
    return token, low - INT32_END
