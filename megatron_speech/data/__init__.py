"""Datasets on disk, and the road from them to batches: blend, packing, loader."""
