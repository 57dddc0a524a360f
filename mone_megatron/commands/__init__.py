"""The command lines, a module each with a ``main``; ``mone NAME`` and ``tools/`` call them."""
