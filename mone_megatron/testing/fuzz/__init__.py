"""Trains random configurations and holds what must be so of every one of them (``make fuzz``)."""
