"""Finds, links and checks datasets, and decides where everything goes."""
