"""Devices and processes: the mesh, device memory, joining and stopping many processes, signals."""
