"""From a configuration to megatron-core model chunks."""
