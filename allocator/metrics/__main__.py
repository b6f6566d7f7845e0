"""``python -m kvheap.metrics`` prints the dashboard for Grafana, as JSON."""

from __future__ import annotations

import json

from kvheap.metrics.dashboard import dashboard

if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
