"""Text to ids and back: the tokenizer and its training."""

from minillm.tokenization.tokenization_minillm import MiniLLMTokenizer

__all__ = ["MiniLLMTokenizer"]
