"""The checks of a first GPU take a few minutes and no network (``tools/gpu_check.py``).

Each check is a process of its own with a limit; what one finds is written before the next begins.
"""
