"""Compares what two versions of the code compute, bitwise: ``tools/compare_commits.py``.

Both versions are driven from outside, by command lines and files, never by their modules: those
move from commit to commit.
"""
