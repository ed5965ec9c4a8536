"""Perplexity, and the n-gram baselines that a language model has to beat."""

from minillm.evaluation.bootstrap import Interval, bootstrap_interval
from minillm.evaluation.ngram import BigramModel, UnigramModel, ngram_perplexity
from minillm.evaluation.perplexity import PerplexityResult, batches, perplexity, token_nll

__all__ = [
    "BigramModel",
    "Interval",
    "PerplexityResult",
    "UnigramModel",
    "batches",
    "bootstrap_interval",
    "ngram_perplexity",
    "perplexity",
    "token_nll",
]
