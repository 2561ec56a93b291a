"""What a checkpoint says: canaries, scorers and the report."""
