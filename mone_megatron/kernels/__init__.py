"""Tensor operations of the method. Imports nothing else of this package.

``reference`` defines what is correct; ``ops`` chooses the fastest exact implementation.
"""
