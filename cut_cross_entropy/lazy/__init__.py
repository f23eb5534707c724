"""Lazy logits: the loss of a model's head without its logits, whatever the model does between them."""
