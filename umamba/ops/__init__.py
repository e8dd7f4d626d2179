"""The operators: the selective scan with its backends, the causal convolution, token orders."""
