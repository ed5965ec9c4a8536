"""`pytest --deprecations`: what transformers says of a deprecated name that our code uses becomes a failure.

transformers says it by `warnings.warn` or by its logger. Whose code it speaks of is read from the stack: that of the
first frame that is neither its own nor of what it is called through. Other libraries (PEFT, TRL) may use what they
like, and so may the parts of transformers that do.
"""

import logging
import sys
import warnings
from pathlib import Path
from types import FrameType

import pytest

REPOSITORY = Path(__file__).parents[2]
PASSED_OVER = ("transformers", "torch", "accelerate", "logging", "warnings", "contextlib", "functools", __name__)
SAID = ("deprecat", "will be removed")
USERS = ("transformers.generation.candidate_generator",)
"""Parts of transformers that call what transformers has deprecated."""


def is_of_transformers(frame: FrameType | None) -> bool:
    return frame is not None and module_of(frame).partition(".")[0] == "transformers"


def module_of(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "")


def place_of_use(frame: FrameType | None) -> str | None:
    """The file and line of our code, tests included, that a message from this frame is about; None if it is about
    somebody else's."""
    while frame is not None and module_of(frame).partition(".")[0] in PASSED_OVER:
        if module_of(frame) in USERS:
            return None
        frame = frame.f_back
    if frame is None:
        return None
    file = Path(frame.f_code.co_filename)
    shipped = module_of(frame).partition(".")[0] in ("minillm", "transformers_modules")
    ours = shipped or (file.is_relative_to(REPOSITORY) and "site-packages" not in file.parts)
    return f"{file}:{frame.f_lineno}" if ours else None


def refuse(message: str, frame: FrameType | None) -> None:
    """Fails if a message tells of something deprecated that our code uses."""
    place = place_of_use(frame) if any(word in message.lower() for word in SAID) else None
    if place is not None:
        # No Exception, so that no code that handles errors takes it.
        pytest.fail(f"deprecated in transformers, used at {place}: {message}")


class Refusal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        refuse(record.getMessage(), sys._getframe(1))


def turn_into_failures() -> None:
    """From now on, for this process."""
    warn = warnings.warn

    def warn_or_refuse(message, category=None, stacklevel=1, *args, **kwargs):
        if is_of_transformers(sys._getframe(1)):
            refuse(str(message), sys._getframe(1))
        warn(message, category, stacklevel + 1, *args, **kwargs)

    warnings.warn = warn_or_refuse
    logging.getLogger("transformers").addHandler(Refusal(logging.WARNING))
