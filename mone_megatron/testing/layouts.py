"""Lists the parallel layouts that must all train the same model, and model parts to try on them.

They are read by ``tests/integration/test_layouts_agree.py`` (the layouts agree with one another)
and by ``tools/compare_commits.py`` (each computes the same in two versions of the code).
"""

from __future__ import annotations

# Processes -> name -> settings.
LAYOUTS: dict[int, dict[str, tuple[str, ...]]] = {
    1: {
        "one": (),
        "one_without_distributed_optimizer": ("parallel.distributed_optimizer=false",),
        "one_recompute_selective": ("train.recompute=selective",),
        "one_recompute_full": ("train.recompute=full",),
    },
    2: {
        "ep2": ("parallel.expert=2",),
        "ep2_allgather": ("parallel.expert=2", "parallel.dispatcher=allgather"),
        "ep2_without_distributed_optimizer": (
            "parallel.expert=2",
            "parallel.distributed_optimizer=false",
        ),
        "tp2_etp2": ("parallel.tensor=2", "parallel.expert_tensor=2"),
        "tp2_etp2_allgather": (
            "parallel.tensor=2",
            "parallel.expert_tensor=2",
            "parallel.dispatcher=allgather",
        ),
        "tp2_ep1_etp1": ("parallel.tensor=2",),
        "tp2_ep1_etp1_without_distributed_optimizer": (
            "parallel.tensor=2",
            "parallel.distributed_optimizer=false",
        ),
        "tp2_ep2_etp1": ("parallel.tensor=2", "parallel.expert=2"),
        "pp2": ("parallel.pipeline=2",),
        "pp2_interleaved": ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
        "dp2": (),
        "etp2_tp1": ("parallel.expert_tensor=2",),
    },
    4: {
        "tp2_ep2_on_4": ("parallel.tensor=2", "parallel.expert=2"),
        "tp2_ep4_on_4": ("parallel.tensor=2", "parallel.expert=4"),
        "tp2_etp2_ep2_on_4": (
            "parallel.tensor=2",
            "parallel.expert_tensor=2",
            "parallel.expert=2",
        ),
        "pp2_ep2_on_4": ("parallel.pipeline=2", "parallel.expert=2"),
        "ep2_dp4_recompute": ("parallel.expert=2", "train.recompute=selective"),
        "tp2_ep1_etp1_on_4": ("parallel.tensor=2",),
    },
}

# Parts of the model and of the method that the tiny experiments leave out: (settings, layout on
# two processes that is hardest for them).
SHARED = ("model.shared_expert_ffn_hidden_size=64", "model.shared_expert_gate=true")
DENSE_MODEL = ("model.num_experts=0", "mone.apply_to=[dense]", "mone.balance.coeff=0.1")
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tied_embeddings": (("model.tie_embeddings=true",), ("parallel.pipeline=2",)),
    "shared_expert": ((*SHARED, "mone.apply_to=[routed,shared]"), ("parallel.tensor=2",)),
    "dense_layer": (
        ("model.first_dense_layers=1", "mone.apply_to=[routed,dense]"),
        ("parallel.tensor=2", "parallel.expert_tensor=2"),
    ),
    "dense_stage": (("model.first_dense_layers=2",), ("parallel.pipeline=2",)),
    "expert_bias": (
        (
            "model.router.score_function=sigmoid",
            "model.router.expert_bias=true",
            "model.router.expert_bias_rate=0.01",
            "model.router.balance=[seq_aux_loss]",
        ),
        ("parallel.tensor=2", "parallel.expert=2"),
    ),
    "raw_weights_of_all_neurons": (
        ("mone.balance.normalize=false", "mone.balance.weights=all"),
        ("parallel.tensor=2", "parallel.expert_tensor=2"),
    ),
    "normalised_weights_of_all_neurons": (
        ("mone.balance.weights=all", "mone.balance.coeff=0.1"),
        ("parallel.expert=2",),
    ),
    "dense_model": (DENSE_MODEL, ("parallel.context=2",)),
    "dense_model_in_two_copies": (DENSE_MODEL, ()),
    "signed_gate": (("mone.score=signed_gate",), ("parallel.expert_tensor=2",)),
}
