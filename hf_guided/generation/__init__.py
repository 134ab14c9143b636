"""Generating many samples: seeded batches, resumable runs over several processes, file formats, grids. No metrics."""
