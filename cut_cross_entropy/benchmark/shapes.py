"""Classifiers of well-known models: V classes, D features and the softcap of the logits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Classifier of a model: V classes, D features, and its softcap."""

    name: str
    num_classes: int
    dim: int
    softcap: float | None = None
    title: str = ""


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gemma2", 256000, 2304, 30.0, "Gemma 2 2B"),
        Shape("gemma2-9b", 256000, 3584, 30.0, "Gemma 2 9B"),
        Shape("gemma2-27b", 256000, 4608, 30.0, "Gemma 2 27B"),
        Shape("llama3-8b", 128256, 4096, title="Llama 3 8B"),
        Shape("llama3-70b", 128256, 8192, title="Llama 3 70B"),
        Shape("llama3.2-1b", 128256, 2048, title="Llama 3.2 1B"),
        Shape("ministral-8b", 131072, 4096, title="Ministral 8B"),
        Shape("mistral-nemo", 131072, 5120, title="Mistral NeMo"),
        Shape("phi3.5", 32064, 3072, title="Phi 3.5 Mini"),
        Shape("qwen3-0.6b", 151936, 1024, title="Qwen3 0.6B"),
        Shape("qwen3-8b", 151936, 4096, title="Qwen3 8B"),
        Shape("gpt-oss", 201088, 2880, title="gpt-oss"),
        Shape("gpt2", 50257, 768, title="GPT-2"),
    )
}

SMALL = Shape("small", 16384, 256, title="small, for CPUs")
"""Shape that is measured without a GPU."""
