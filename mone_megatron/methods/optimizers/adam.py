"""Names Adam with decoupled weight decay: megatron-core's own, fused where there is a fused one."""

from mone_megatron.methods.optimizer import Optimizer

METHOD = Optimizer(
    name="adam",
    formula="Adam with decoupled weight decay",
    source="arXiv 1711.05101",
    moments=("exp_avg", "exp_avg_sq"),
)
