"""Data sets and a network that come with packages, for the demo and the tests; not the core."""
