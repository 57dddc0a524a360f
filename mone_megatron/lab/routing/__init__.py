"""The routing analysis records once which experts and neurons tokens use, then counts them.

``trace`` is the file format (``bits`` packs kept neurons), ``record`` writes it from a transformers
model, ``megatron`` from Megatron-LM's routing trace. ``statistics`` reads it with the functions of
``counting`` and ``excess``; ``summary`` makes a few numbers of it; ``subjects`` goes through
several checkpoints. ``statistics_files``, ``figures`` and ``explorer`` show what was counted.
"""
