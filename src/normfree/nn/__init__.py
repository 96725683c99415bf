"""Building blocks of normalizer-free networks: signal propagation, weight-standardised convolution, layers."""
