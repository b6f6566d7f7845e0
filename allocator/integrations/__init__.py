"""Adapters between kvheap and other projects. Nothing else in kvheap imports them.

Every module here can be imported without the project that it adapts to. If using a name imports
the project, its documentation says so.
"""
