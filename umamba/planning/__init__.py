"""Planning: fingerprint, plans that fit network, memory and time, and preprocessing."""
