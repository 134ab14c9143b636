"""The pipelines, one a file, each readable from top to bottom. Sampling alone: no files of samples, no metrics."""
