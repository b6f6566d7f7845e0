"""Adapters between kvheap and other projects. Nothing else in kvheap imports them.

Every module here can be imported without the project it adapts to. A name that imports the project
when it is used says so.
"""
