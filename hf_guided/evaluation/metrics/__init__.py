"""Metrics as pure functions of arrays and moments, as in their papers. No files and no models."""
