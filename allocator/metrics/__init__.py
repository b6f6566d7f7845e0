"""What heaps do, for Prometheus and Grafana; see :class:`~kvheap.metrics.Metrics`.

``pip install prometheus_client``, then:

>>> import torch
>>> from kvheap import TensorMemoryAllocator
>>> from kvheap.metrics import watch
>>> heap = TensorMemoryAllocator(torch.zeros(1 << 20, dtype=torch.uint8))
>>> watch(heap, "an example")  # in prometheus_client.REGISTRY
'an example'
"""

from kvheap.metrics.dashboard import dashboard
from kvheap.metrics.kinds import Kind, Metric, counter, gauge
from kvheap.metrics.metrics import Metrics, watch

__all__ = ["Kind", "Metric", "Metrics", "counter", "dashboard", "gauge", "watch"]
