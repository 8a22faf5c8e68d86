"""Targets that are stored, and read in place of their teacher."""
