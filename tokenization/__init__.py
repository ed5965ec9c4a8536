"""Text to ids and back: the tokenizer and its training, more pieces for a trained one, and how well one fits."""

from minillm.tokenization.fertility import FertilityReport, measure_fertility
from minillm.tokenization.vocabulary_extension import extend_vocabulary, spell_new_tokens

__all__ = ["FertilityReport", "extend_vocabulary", "measure_fertility", "spell_new_tokens"]
