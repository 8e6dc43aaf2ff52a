"""Memory, FLOPs and communication of every program on accelerators that need not be attached."""
