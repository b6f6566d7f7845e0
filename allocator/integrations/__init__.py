"""Other projects' interfaces, answered by kvheap: one module each, none imported by kvheap itself.

A module imports the project it serves only where that is said, so each can be imported without it.
"""
