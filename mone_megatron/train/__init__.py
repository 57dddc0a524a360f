"""Training: ``run`` is the build spine, ``loop`` the loop, ``step`` a step, ``hooks`` the rest."""
