"""Holds all workarounds for megatron-core and differences of its releases; no other place does.

Releases: 0.16.1 (the last for Python 3.10 and 3.11) and 0.19 (Python 3.12). A difference is asked
for where it lies, by what the installed release has, never by its number; the tests know the number
of each and fail when it is no difference any more.

megatron-core is written for CUDA. Its distributed data parallelism, distributed optimizer,
pipeline schedules and token dispatchers are plain torch over ``torch.distributed``, so they run
on CPU over gloo once the few places that name CUDA are redirected. That is what
:mod:`.cpu_backend` does: it changes no algorithm, and it is called before anything else imports
``megatron``. What it puts in place is of three kinds, each with its reason:

* ``torch.cuda`` functions (streams, events, RNG state, the current device) get CPU meanings
  (:mod:`.cuda_names`, :mod:`.random_state`);
* string constants in a handful of functions (``device="cuda"``, ``"torch.cuda.FloatTensor"``)
  are replaced in their code objects, which costs nothing at run time (:mod:`.cuda_constants`);
* a few small functions are replaced whole (:mod:`.token_exchange`, :mod:`.gradient_norm`,
  :mod:`.master_weights`, :mod:`.rotary_embedding`, :mod:`.context_parts`), or given what is else
  a CUDA kernel of apex (:mod:`.weight_gradients`).

On any device :mod:`.importing` imports megatron-core without what it imports for others, mends
what it breaks without Transformer Engine (:mod:`.missing_transformer_engine`), keeps harmless
notices off the terminal (:mod:`.notices`), and keeps the results of writers in the process
(:mod:`.checkpoint_forms`). :mod:`.gradient_norm` has fused kernels for CUDA, too, and
:mod:`.process_groups` makes no group twice.

The rest asks the installed release for what differs: :mod:`.auxiliary_losses`,
:mod:`.prediction_losses`, :mod:`.token_exchange`, :mod:`.context_parts`, :mod:`.checkpoint_forms`,
:mod:`.attention_modules`, :mod:`.gradient_norm`.

``tests/parallel/test_megatron_compat.py`` fails when upstream no longer needs one of them.
"""
