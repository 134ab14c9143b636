"""The pipelines, one per file, each readable from top to bottom. They only sample: no files, no metrics."""
