"""Computes the method's tensor operations. It imports nothing else of this package.

``reference`` defines what is correct; ``ops`` chooses the fastest exact implementation.
"""
