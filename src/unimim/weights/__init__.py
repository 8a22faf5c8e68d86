"""Networks by name, files of weights, and how one is fitted to the other."""
