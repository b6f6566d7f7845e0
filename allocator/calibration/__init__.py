"""Measuring what each path of a copy costs on this device."""
