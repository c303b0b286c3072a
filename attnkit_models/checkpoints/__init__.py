"""Checkpoints: the weights that papers' authors published, read into attnkit's models and written back."""
