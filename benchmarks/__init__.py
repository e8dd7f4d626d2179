"""Commands that measure; README.md says which figure comes from which."""
