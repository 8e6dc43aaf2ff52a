"""Losses, the jitted step, the training loop and its run directories."""
