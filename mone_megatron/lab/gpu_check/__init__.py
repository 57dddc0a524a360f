"""What a first GPU is asked, in a few minutes and without a network (``tools/gpu_check.py``).

Each check is a process of its own with a limit; what one finds is written before the next begins.
"""
