"""A checkpoint evaluated: canaries, scorers and the report."""
