"""Which experts and which neurons tokens use: recorded once, then counted.

``trace`` is the file format, ``record`` writes it from a transformers model, ``megatron`` from
Megatron-LM's routing trace; ``counting`` and ``statistics`` read it; ``output``, ``figures`` and
``explorer`` show what was counted.
"""
