"""How many neurons can a trained model do without? Pruning per token, without changing a weight.

``plans`` says what to prune, ``ranking`` which neurons a token loses, ``places`` where they are in
a transformers model. ``resident`` and ``streaming`` measure plans, with the whole model in memory
or one layer of it. ``statistics`` describes the activations, ``budget`` allots shares to layers,
``results`` keeps what was measured, ``study`` does all of it for one model and ends with
``findings``, which ``output`` and ``figures`` show.
"""
