"""Metrics as formulas on arrays and moments, after their papers. No files and no models."""
