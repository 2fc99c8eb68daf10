"""Rows of data as token ids with labels: knows no tensors, no model and no cache."""
