"""The format of the official code: its config, its names of tensors, its projectors, tower and processor."""
