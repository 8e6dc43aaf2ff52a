"""Errors, atomic and locked files, JSON Lines, progress bars: nothing of the method."""
