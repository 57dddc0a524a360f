"""Measures how many neurons a trained model can do without, pruned per token, weights unchanged.

``plans`` says what to prune, ``ranking`` which neurons a token loses, ``places`` where they are in
a transformers model. ``resident`` and ``streaming`` measure plans, with the whole model in memory
or one layer of it. ``statistics`` describes the activations, ``budget`` allots shares to layers,
``kept_results`` keeps what was measured, ``measured_study`` does all of it for one model and ends
with ``findings``, which ``result_files`` and ``figures`` show.
"""
