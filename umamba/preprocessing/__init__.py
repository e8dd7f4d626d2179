"""The arithmetic of one case: what planning and inference do to its arrays alike."""
