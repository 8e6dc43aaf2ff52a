"""Devices and processes: mesh, device memory, multi-process runs, signals."""
