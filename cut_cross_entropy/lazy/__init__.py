"""Lazy logits: losses of a model's head without its logits, whatever the model does in between."""
