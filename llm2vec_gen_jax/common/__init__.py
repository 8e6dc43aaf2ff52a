"""Errors, atomic and locked files, JSON Lines, progress bars, subprocesses with limits: nothing of the method."""
