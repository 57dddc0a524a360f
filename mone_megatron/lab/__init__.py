"""What asks questions of models and of this code: analyses, fits, studies, benchmarks.

It uses the core; the core never imports it.
"""
