"""Prediction: sliding window in float32, export under a memory limit, validation of a fold."""
