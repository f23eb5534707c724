"""Measurements of the loss: data like a trained model's, and the benchmark command."""
