"""How MiniLLM enters transformers and PEFT: Auto classes, adapter targets, attention in blocks for any model."""

__all__: list[str] = []
