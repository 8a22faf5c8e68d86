"""T, the targets: what the student has to predict, one kind a file."""
