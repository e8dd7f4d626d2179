"""Prediction: sliding window in float32, export under a memory limit, final validation of a fold."""
