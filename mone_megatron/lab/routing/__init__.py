"""Which experts and which neurons tokens use: recorded once, then counted.

``trace`` is the file format (``bits`` packs kept neurons), ``record`` writes it from a transformers
model, ``megatron`` from Megatron-LM's routing trace. ``statistics`` reads it with the functions of
``counting`` and ``excess``; ``summary`` makes a few numbers of it; ``subjects`` goes through
several checkpoints. ``output``, ``figures`` and ``explorer`` show what was counted.
"""
