import pytest
import torch

from kvheap import TensorMemoryAllocator
from kvheap.geometry import GEOMETRIES
from kvheap.prefix_store import PrefixStore

G = GEOMETRIES["tiny"]


@pytest.mark.parametrize("after", [False, True])
def test_interrupted_eviction(monkeypatch, after):
    a = TensorMemoryAllocator(torch.zeros(4 * 4096, dtype=torch.uint8))
    s = PrefixStore(a, G)
    z = lambda n: torch.zeros(n, *G.shape, dtype=G.dtype)
    s.store([1, 2, 3, 4], z(4))
    free = a.batched_free

    def f(objs, out=None):
        if after:
            free(objs, out)
        raise KeyboardInterrupt

    monkeypatch.setattr(a, "batched_free", f)
    with pytest.raises(KeyboardInterrupt):
        s.store([8, 9], z(2))
    assert list(s._chunks) == ([3, 4] if after else [1, 2, 3, 4])
    assert all(c.is_valid() for c in s._chunks.values())
