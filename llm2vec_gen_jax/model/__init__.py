"""The method as pure functions of arrays: a frozen causal LLM (Flax Linen), compression tokens and two heads."""
