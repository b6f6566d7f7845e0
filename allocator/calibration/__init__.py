"""Measures the cost of each path of a copy on a device."""
