"""Devices and their asynchronous work: streams, events, completions, transfer handles."""
