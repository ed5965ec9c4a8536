"""How good a model is: bits per byte, items scored every way, intervals, and the n-gram models that it has to beat.

`minillm.evaluation.harness`, which needs lm-evaluation-harness, is imported by itself.
"""

from minillm.evaluation.bits_per_byte import (
    DocumentLoss,
    TextResult,
    document_losses,
    loss_difference,
    rolling_windows,
    summarize_losses,
)
from minillm.evaluation.bootstrap import Interval, bootstrap_interval
from minillm.evaluation.continuations import Reader
from minillm.evaluation.item_report import (
    agreement,
    changed_items,
    compare_items,
    differing_items,
    summarize_items,
)
from minillm.evaluation.item_scores import ItemScores, score_items
from minillm.evaluation.items import Item, ItemSettings, Prompter, parse_item, read_items
from minillm.evaluation.likelihood import Row, RowScore, pair_row, score_rows
from minillm.evaluation.ngram import BigramModel, UnigramModel, ngram_perplexity
from minillm.evaluation.perplexity import PerplexityResult, batches, perplexity, token_nll
from minillm.evaluation.written_answers import Verdict, judge_answer, normalize_answer

__all__ = [
    "BigramModel",
    "DocumentLoss",
    "Interval",
    "Item",
    "ItemScores",
    "ItemSettings",
    "PerplexityResult",
    "Prompter",
    "Reader",
    "Row",
    "RowScore",
    "TextResult",
    "UnigramModel",
    "Verdict",
    "agreement",
    "batches",
    "bootstrap_interval",
    "changed_items",
    "compare_items",
    "differing_items",
    "document_losses",
    "judge_answer",
    "loss_difference",
    "ngram_perplexity",
    "normalize_answer",
    "pair_row",
    "parse_item",
    "perplexity",
    "read_items",
    "rolling_windows",
    "score_items",
    "score_rows",
    "summarize_items",
    "summarize_losses",
    "token_nll",
]
