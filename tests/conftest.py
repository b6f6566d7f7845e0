"""Shared by all tests: how thorough hypothesis is.

``pytest --hypothesis-profile=long tests/addresses`` looks for hours where the default looks for
seconds: every state machine runs 20,000 examples of 200 steps.
"""

from __future__ import annotations

from hypothesis import settings

# How long an example takes says nothing where other processes run.
settings.register_profile("kvheap", settings(), deadline=None)
settings.load_profile("kvheap")
settings.register_profile("long", max_examples=20_000, stateful_step_count=200, deadline=None)
