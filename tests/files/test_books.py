"""The books of a tier against a naive model, with copies in progress."""

from __future__ import annotations

import random

import pytest

from kvheap.errors import HeapCorruptionError
from kvheap.files.books import MAX_CLOCK, PENDING, Books, Chunk
from kvheap.files.chunk_index import Entry
from kvheap.prefix.orders import ORDERS

PLACE = 8192


def make_books(num_places: int, order: str = "lru") -> Books:
    return Books(num_places, PLACE, ORDERS[order](num_places * PLACE))


def keys(text: str) -> list[bytes]:
    return [letter.encode() for letter in text]


def store(books: Books, text: str) -> list[bytes]:
    """Store chunks; returns what was evicted."""
    plan = books.begin_store(keys(text))
    books.end_store(plan.chunks, is_stored=True)
    books.check()
    return plan.evicted


class TestStore:
    def test_chunks_that_are_stored_together_are_neighbours(self) -> None:
        books = make_books(8)
        plan = books.begin_store(keys("abcd"))
        assert [chunk.address for chunk in plan.chunks] == [0, PLACE, 2 * PLACE, 3 * PLACE]
        assert not books.is_ready(b"a")
        books.end_store(plan.chunks, is_stored=True)
        assert books.is_ready(b"a")

    def test_what_is_there_is_not_stored_again_nor_evicted(self) -> None:
        books = make_books(3)
        store(books, "abc")
        plan = books.begin_store(keys("cd"))
        assert [chunk.key for chunk in plan.chunks] == [b"d"]
        assert plan.evicted == [b"b"]  # the tail of the prefix; c would be next, but is kept

    def test_the_first_keys_are_stored_if_not_all_fit(self) -> None:
        books = make_books(3)
        store(books, "ab")
        books.begin_load(keys("a"))
        plan = books.begin_store(keys("cdef"))
        assert [chunk.key for chunk in plan.chunks] == [b"c", b"d"]
        assert plan.evicted == [b"b"]
        assert plan.refused == 2
        books.check()
        assert books.begin_store(keys("g")) == ([], [], 1)

    def test_a_failed_store_leaves_nothing(self) -> None:
        books = make_books(3)
        plan = books.begin_store(keys("ab"))
        books.end_store(plan.chunks, is_stored=False)
        books.check()
        assert (len(books), books.free_places, books.pending, books.idle) == (0, 3, 0, 0)


class TestForget:
    @pytest.mark.parametrize("is_stored", [True, False])
    def test_the_place_of_a_pending_chunk_is_kept_until_its_store_ends(
        self, is_stored: bool
    ) -> None:
        books = make_books(2)
        old = books.begin_store(keys("a")).chunks
        assert books.forget(old) == [b"a"]
        books.check()
        new = books.begin_store(keys("ab")).chunks  # the key may come again, in another place
        assert [chunk.key for chunk in new] == [b"a"]
        assert new[0].address != old[0].address
        books.end_store(old, is_stored=is_stored)
        books.check()
        books.end_store(new, is_stored=True)
        books.check()
        assert books.is_ready(b"a")
        assert books.free_places == 1

    def test_the_place_of_a_chunk_that_is_read_is_kept_until_all_loads_end(self) -> None:
        books = make_books(1)
        store(books, "a")
        first, second = books.begin_load(keys("a")), books.begin_load(keys("a"))
        assert first[0] is not None
        books.forget([first[0]])
        books.check()
        books.end_load(first)
        assert books.begin_store(keys("b")).refused == 1
        books.end_load(second)
        books.check()
        assert store(books, "b") == []


class TestRestore:
    def test_chunks_come_back_in_the_order_of_their_use(self) -> None:
        books = make_books(4)
        entries = [Entry(b"x", PLACE, 1, 9), Entry(b"y", 3 * PLACE, 2, 5)]
        assert books.restore(entries) == []
        books.check()
        assert books.free_places == 2
        plan = books.begin_store(keys("abc"))
        assert plan.evicted == [b"y"]
        assert min(chunk.used for chunk in plan.chunks) > 9

    @pytest.mark.parametrize(
        "wrong",
        [
            Entry(b"w", 4 * PLACE, 0, 1),  # beyond the end
            Entry(b"w", 2**63, 0, 1),
            Entry(b"w", 512, 0, 1),
            Entry(b"w", 0, 0, MAX_CLOCK + 1),
        ],
    )
    def test_what_cannot_be_is_refused(self, wrong: Entry) -> None:
        books = make_books(4)
        assert books.restore([Entry(b"x", PLACE, 1, 9), wrong]) == [b"w"]
        books.check()
        assert [chunk.key for chunk in books.ready()] == [b"x"]

    def test_of_two_chunks_at_one_place_the_later_one_counts(self) -> None:
        books = make_books(4)
        assert books.restore([Entry(b"x", PLACE, 1, 9), Entry(b"y", PLACE, 2, 5)]) == [b"y"]
        books.check()
        assert books.is_ready(b"x")

    def test_a_full_file(self) -> None:
        books = make_books(3)
        assert books.restore([Entry(b"%d" % i, i * PLACE, 0, i) for i in range(3)]) == []
        books.check()
        assert books.free_places == 0


class TestCheck:
    @pytest.mark.parametrize(
        ("spoil", "what"),
        [
            (lambda books: setattr(books, "idle", 7), "idle"),
            (lambda books: setattr(books, "pending", 7), "pending"),
            (lambda books: setattr(books.find(b"a"), "address", PLACE), "two chunks"),
            (lambda books: setattr(books.find(b"a"), "address", 3 * PLACE), "free place"),
            (lambda books: setattr(books.find(b"a"), "address", 1), "no place"),
            (lambda books: setattr(books.find(b"a"), "is_gone", True), "gone"),
            (lambda books: books._order.remove(b"a"), "order"),
        ],
    )
    def test_it_sees_what_is_wrong(self, spoil, what: str) -> None:  # type: ignore[no-untyped-def]
        books = make_books(4)
        store(books, "ab")
        spoil(books)
        with pytest.raises(HeapCorruptionError, match=what):
            books.check()


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_random_calls_against_a_naive_model(order: str) -> None:
    rng = random.Random(order)
    num_places = 12
    books = make_books(num_places, order)
    stores: list[list[Chunk]] = []
    loads: list[list[Chunk | None]] = []
    num_evicted = num_refused = 0
    at: dict[bytes, int] = {}  # what should be found: the place of each key

    def in_use() -> set[int]:
        moving = {chunk.address for chunks in stores for chunk in chunks}
        return moving | {chunk.address for load in loads for chunk in load if chunk is not None}

    for _ in range(1500):
        some = rng.sample([b"%d" % i for i in range(30)], rng.randint(1, 5))
        step = rng.choice(("store", "end", "load", "end load", "forget", "touch"))
        if step == "store":
            held = in_use()
            plan = books.begin_store(some)
            for key in plan.evicted:
                assert key not in some  # neither what is wanted, nor what is being moved
                assert at.pop(key) not in held
            for chunk in plan.chunks:
                assert chunk.address not in set(at.values()) | held
                assert chunk.key not in at
                at[chunk.key] = chunk.address
            num_evicted += len(plan.evicted)
            num_refused += plan.refused
            missing = [key for key in some if key not in at]
            assert len(missing) == plan.refused
            assert missing == some[len(some) - len(missing) :] or len(plan.chunks) < len(some)
            if plan.refused:
                assert all(place in in_use() or key in some for key, place in at.items())
            stores.append(plan.chunks)
        elif step == "end" and stores:
            ended = stores.pop(rng.randrange(len(stores)))
            is_stored = rng.random() < 0.8
            lost = [c.key for c in ended if not is_stored and at.get(c.key) == c.address]
            books.end_store(ended, is_stored)
            for key in lost:
                del at[key]
        elif step == "load":
            found = books.begin_load(some)
            for key, loaded in zip(some, found, strict=True):
                is_pending = any(
                    c.key == key for s in stores for c in s if at.get(key) == c.address
                )
                assert (loaded is not None) == (key in at and not is_pending)
                assert loaded is None or loaded.address == at[key]
            loads.append(found)
        elif step == "end load" and loads:
            books.end_load(loads.pop(rng.randrange(len(loads))))
        elif step == "forget":
            chunks = [chunk for key in some[:2] if (chunk := books.find(key)) is not None]
            assert books.forget(chunks) == [chunk.key for chunk in chunks]
            for chunk in chunks:
                del at[chunk.key]
        elif step == "touch":
            books.touch(some)
        books.check()
        assert {chunk.key: chunk.address for chunk in books._chunks.values()} == at
        assert all((c.loads == PENDING) == (not books.is_ready(c.key)) for c in books.ready())
    assert num_evicted > 40
    assert num_refused > 100
