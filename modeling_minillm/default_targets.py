"""Adapters without `target_modules`, also where MiniLLM is not installed: the targets stand in PEFT's own tables."""

import sys

PEFT_TABLES = "peft.utils.constants"


def fill_peft_tables() -> None:
    """Enters MiniLLM in every default-target table of PEFT that knows LLaMA: the modules have the same names (a
    feed-forward without a gate simply lacks that one, and PEFT matches what is there)."""
    for name, table in vars(sys.modules[PEFT_TABLES]).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            table.setdefault("minillm", table["llama"])
