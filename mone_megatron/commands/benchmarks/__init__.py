"""Holds the benchmarks of the command line, one a file: its options, and how it is run.

What is timed stands in :mod:`mone_megatron.lab.benchmarks`. That is imported by the functions that
measure only, since each rank imports these files before it can prepare for megatron-core.
"""

from mone_megatron.commands.benchmarks import (
    cost,
    decode,
    generate,
    layer,
    peers,
    save,
    select,
    spine,
    ties,
    train,
)

# In the order in which they are listed.
BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (layer, select, ties, train, peers, cost, decode, generate, spine, save)
}
