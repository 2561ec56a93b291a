"""What conversions read: rows of samples from files, one module per format."""
