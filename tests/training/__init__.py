"""Tests of the training script, on a random Llama of a few thousand parameters."""
