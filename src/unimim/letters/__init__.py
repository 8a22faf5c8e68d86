"""The letters of the equation: T, N, M, S, H and L, and the values that travel between them."""
