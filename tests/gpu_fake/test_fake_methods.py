"""Every method of the registries in the step on a CUDA device that is not there.

A run takes one method of each registry, so that a few runs take them all. None of them makes the
host wait for the GPU in a layer. `slow`, but for two runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_runs import SMALL, fake_run

from mone_megatron.methods.density_steps import DENSITY_STEPS
from mone_megatron.methods.hooks import HOOKS
from mone_megatron.methods.optimizers import OPTIMIZERS
from mone_megatron.methods.routers import ROUTERS
from mone_megatron.methods.rules import RULES
from mone_megatron.methods.sparsity_losses import SPARSITY_LOSSES
from mone_megatron.testing.each_method import REGISTRIES, needed
from mone_megatron.testing.fake_cuda.guard import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no fake device: {why_not()}")

ROUTER = "model.router.kind"
RUNS = max(len(registry) for registry, _, _ in REGISTRIES)
# The others find less, and take as long: rules that rank rows together, a density that is steered.
MAIN = {run for run, rule in enumerate(RULES.names) if rule in ("batch_topk", "pooled")}


def overrides(run: int) -> tuple[str, ...]:
    """Returns the settings of a run: of each registry the method whose turn it is."""
    chosen = {key: registry.names[run % len(registry)] for registry, key, _ in REGISTRIES}
    settings = [f"{key}={name}" for key, name in chosen.items()]
    settings += [setting for override in settings for setting in needed(override)]
    optimizer = OPTIMIZERS[chosen["optim.name"]]
    settings.append(f"parallel.distributed_optimizer={str(not optimizer.whole).lower()}")
    settings.append(f"train.hooks=[{','.join(HOOKS.names)}]")
    loss = SPARSITY_LOSSES.names[run % len(SPARSITY_LOSSES)]
    if SPARSITY_LOSSES[loss].function is not None:
        settings += [f"model.sparsity_loss={loss}", "model.sparsity_coeff=0.001"]
    steered = RULES[chosen["mone.rule"]].steerable
    if steered:
        step = DENSITY_STEPS.names[run % len(DENSITY_STEPS)]
        settings += [f"mone.density.step={step}", f"mone.density.steers={next(iter(steered))}"]
    return tuple(settings)


def test_the_runs_take_every_method() -> None:
    given = {setting for run in range(RUNS) for setting in overrides(run)}
    for registry, key, _ in REGISTRIES:
        assert {f"{key}={name}" for name in registry.names} <= given
    losses = [loss.name for loss in SPARSITY_LOSSES if loss.function is not None]
    assert {f"model.sparsity_loss={name}" for name in losses} <= given


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fake_methods")


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=() if run in MAIN else pytest.mark.slow) for run in range(RUNS)]
)
def test_no_method_makes_the_host_wait_in_a_layer(run: int, folder: Path) -> None:
    settings = overrides(run)
    done = fake_run(
        folder, 1, "experiment=tiny_mone", *SMALL, "train.global_batch_size=1", *settings
    )
    assert done.found(kind="fault") == []
    waits = done.found("step", kind="wait")
    (router,) = (value for key, _, value in (s.partition("=") for s in settings) if key == ROUTER)
    # How many rows are sent, which is the shape of what megatron-core sends (docs/gpu.md).
    shapes = [wait for wait in waits if "token_exchange.py" in wait.place]
    assert len(shapes) == (done.dispatches if ROUTERS[router].own_weights else 0)
    rest = [wait for wait in waits if wait not in shapes]
    assert [wait for wait in rest if wait.in_layer and wait.by_us] == []
    assert len([wait for wait in rest if not wait.in_layer]) <= 3, rest
    assert done.written["compiled_later"] == []
