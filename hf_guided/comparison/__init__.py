"""Comparison of families of generative models: the same training budget, the same metrics, one report with plots.

The only room of the library that imports `training`.
"""
