"""Chooses the fastest path of a copy on a device. Imports no torch and queries no device."""
