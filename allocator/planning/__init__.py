"""Which path of a copy is the fastest on a device. Imports no torch and asks no device."""
