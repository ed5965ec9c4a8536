"""`pytest --deprecations` fails where our code uses what transformers calls deprecated, however it says so."""

import contextlib
import logging
import warnings

import deprecations
import pytest
from matrix_cases import loud_model, tiny_config
from transformers import PreTrainedModel
from transformers.utils.deprecation import deprecate_kwarg


@pytest.fixture(autouse=True)
def turned_on(monkeypatch):
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(warnings, "warn", warnings.warn)
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    deprecations.turn_into_failures()


def refused():
    return pytest.raises(pytest.fail.Exception, match=r"used at .*test_deprecations\.py")


@deprecate_kwarg("old", version="99.0.0", new_name="new")
def function(new):
    return new


@pytest.mark.parametrize("time", ["first", "second"])
def test_a_name_that_is_logged_once(time):
    with refused():
        _ = loud_model(tiny_config()).config.torch_dtype


def test_an_argument():
    with refused():
        function(old=1)


def test_what_other_libraries_do_is_theirs():
    code = compile("function(old=1)", "/elsewhere/library.py", "exec")
    with pytest.warns(FutureWarning, match="deprecated"):
        exec(code, {"__name__": "library", "function": function})


def test_our_code_is_ours_wherever_it_is_installed():
    code = compile("function(old=1)", "/elsewhere/site-packages/minillm/layers.py", "exec")
    with pytest.raises(pytest.fail.Exception, match="used at /elsewhere"):
        exec(code, {"__name__": "minillm.layers", "function": function})


def test_what_is_not_deprecated_is_said_as_before():
    with pytest.warns(UserWarning, match="mind the gap"):
        warnings.warn("mind the gap", stacklevel=1)


def test_checkpointing_by_its_old_name():
    deprecated = hasattr(PreTrainedModel, "activation_checkpointing_enable")
    with refused() if deprecated else contextlib.nullcontext():
        loud_model(tiny_config()).gradient_checkpointing_enable()
