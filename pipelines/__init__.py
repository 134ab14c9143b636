"""The pipelines, one per file, each readable from top to bottom, and how a saved one is loaded.

They sample, and say how likely an image is where they can; metrics of many images are evaluation's.
"""
