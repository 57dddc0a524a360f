"""Runs megatron-core on a CPU: every redirection, in the order in which they have to be made."""

from __future__ import annotations

import sys

from mone_megatron.parallel.gloo import share_gloo_devices
from mone_megatron.parallel.groups_of_one import leave_out_collectives_of_one
from mone_megatron.parallel.megatron_compat.context_parts import cut_angles_on_cpu
from mone_megatron.parallel.megatron_compat.cuda_constants import rewrite_all_constants
from mone_megatron.parallel.megatron_compat.cuda_names import is_redirected, redirect_cuda_names
from mone_megatron.parallel.megatron_compat.gradient_norm import measure_gradients_on_cpu
from mone_megatron.parallel.megatron_compat.importing import import_megatron
from mone_megatron.parallel.megatron_compat.master_weights import copy_no_parameter_onto_itself
from mone_megatron.parallel.megatron_compat.random_state import track_cpu_generator
from mone_megatron.parallel.megatron_compat.rotary_embedding import rotate_without_copies
from mone_megatron.parallel.megatron_compat.router_topk import choose_experts_in_one_pass
from mone_megatron.parallel.megatron_compat.token_exchange import exchange_over_gloo
from mone_megatron.parallel.megatron_compat.weight_gradients import provide_weight_gradients_on_cpu


def install_cpu_backend() -> None:
    """Redirects megatron-core's uses of CUDA to the CPU. It may be called again.

    Raises:
        RuntimeError: when megatron-core was imported before this call by somebody else, since
            some of its modules bind names of ``torch.cuda`` at import.
    """
    if is_redirected():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("install_cpu_backend() must be called before megatron.core is imported")
    redirect_cuda_names()
    share_gloo_devices()
    leave_out_collectives_of_one()
    import_megatron(compile_fused=False)
    track_cpu_generator()
    exchange_over_gloo()
    measure_gradients_on_cpu()
    copy_no_parameter_onto_itself()
    rotate_without_copies()
    cut_angles_on_cpu()
    provide_weight_gradients_on_cpu()
    choose_experts_in_one_pass()
    rewrite_all_constants()
