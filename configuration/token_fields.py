"""What the ids of special tokens mean together and with the vocabulary."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

TOKEN_FIELDS = (
    "bos_token_id eos_token_id mask_token_id gmask_token_id smask_token_id sop_token_id answer_start_token_id "
    "turn_token_ids"
).split()


def ids_outside(fields: Mapping[str, Any], vocab_size: int) -> Iterator[tuple[str, int]]:
    """Fields with an id that the vocabulary does not have, and that id."""
    for name in TOKEN_FIELDS:
        ids = fields.get(name)
        for token_id in ids if isinstance(ids, list) else [ids]:
            if isinstance(token_id, int) and not 0 <= token_id < vocab_size:
                yield name, token_id


def warn_of_tokens(fields: dict[str, Any]) -> None:
    """Warns once of each id that the vocabulary does not have: many published configs carry such ids."""
    for name, token_id in ids_outside(fields, fields["vocab_size"]):
        logger.warning_once(
            f"`{name}={token_id}` lies outside the vocabulary of `vocab_size={fields['vocab_size']}` ids."
        )


def token_conflicts(config: SimpleNamespace) -> list[tuple[bool, str]]:
    """Pairs of (is it so, what is wrong and the way out), from a config's fields."""
    blanks = [config.mask_token_id, config.gmask_token_id, config.smask_token_id]
    return [
        (
            (config.answer_start_token_id is None) != (not config.turn_token_ids),
            f"`answer_start_token_id={config.answer_start_token_id}` and `turn_token_ids={config.turn_token_ids}`"
            ": give both (the token that starts an answer, and those that start a turn of any role), or neither",
        ),
        (
            config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size,
            f"`pad_token_id={config.pad_token_id}` lies outside the vocabulary (`vocab_size={config.vocab_size}`)",
        ),
        (
            (config.sop_token_id is None) != (blanks == [None] * 3),
            f"`sop_token_id={config.sop_token_id}` and {blanks} for `mask_token_id`, `gmask_token_id`, "
            "`smask_token_id`: give a blank and the token that starts what fills it together, or neither",
        ),
    ]
