"""Analyses, fits, studies and benchmarks ask questions of models and of this code.

They use the core; the core never imports them.
"""
