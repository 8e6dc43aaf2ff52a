"""Adapters to other libraries, and the verification of exported models in PyTorch."""
