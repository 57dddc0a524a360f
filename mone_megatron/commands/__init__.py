"""Holds the command lines, a module each with a ``main``; ``mone NAME`` and ``tools/`` run them."""
