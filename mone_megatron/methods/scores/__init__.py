"""Holds the scores that rank the neurons of a token: ``mone.score``. One file each."""

from mone_megatron.methods.registry import Registry
from mone_megatron.methods.score import Score

SCORES: Registry[Score] = Registry(Score, key="mone.score", package="mone_megatron.methods.scores")
