"""Process groups, and the CPU runtime that lets every layout run without a GPU."""
