"""Checkpoints: written whole or not at all, beside the training; checked on open, readable under any parallel layout.

store: names, descriptions, links, damage. contents: what is saved of a process. writing: from the model to the disk,
in two halves. save: the two halves at once, or the second beside the training. retention: which ones stay. run: all of
it, as a run's recipe configures it. load: into a run, or for inference. resume: what may change when a run continues.
"""
