"""Each private name of torch and transformers that is used stands in `docs/private-names.md`, and no other does."""

import ast
import inspect
import re

import pytest
import torch
from matrix_cases import loud_model, tiny_config
from private_names import REPOSITORY, is_private, mentioned, private_names
from transformers import LlamaForCausalLM, LlamaPreTrainedModel

from minillm.generation import MiniLLMGenerationMixin
from minillm.training import checkpointing
from minillm.training.document_collator import DocumentCollator

PAGE = (REPOSITORY / "docs" / "private-names.md").read_text("utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
DECLARED = ("_no_split_modules", "_skip_keys_device_placement", "_can_compile_fullgraph", "_can_record_outputs")
SUPPORTED = ("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend")
PLANS = ("_tied_weights_keys", "_tp_plan", "_pp_plan", "_fsdp_plan")
HOOKS = (
    "_prepare_position_ids_for_generation",
    "_expand_inputs_for_generation",
    "_get_candidate_generator",
    "_validate_generation_mode",
)


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_the_page_names_what_is_used_and_where():
    told = {}
    for names, files, *_ in ROWS:
        for name in quoted(names):
            told.setdefault(name, set()).update(quoted(files))
    assert told == private_names()


def test_a_subclass_of_someone_else_changes_nothing():
    before = private_names()

    class Other(DocumentCollator):
        _capacity = None

    assert private_names() == before, Other


def test_every_name_has_a_reason_a_risk_and_tests_that_are_there():
    assert ROWS
    for row in ROWS:
        names, _, reason, risk, tests = row
        assert len(reason) > 20 and len(risk) > 20, names
        assert quoted(tests), names
        for test in quoted(tests):
            file, _, name = test.partition("::")
            tree = ast.parse((REPOSITORY / file).read_text("utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("x._a(1)", ["_a"]),
        ("x._a = 1", ["_a"]),
        ("from torch._b import _c, d", ["_b", "_c"]),
        ("import torch._b.c", ["_b"]),
        ("f(_d=1)", ["_d"]),
        ("getattr(x, '_init_weights')", ["_init_weights"]),
        ("'_scaled_dot_product_flash_attention'", ["_scaled_dot_product_flash_attention"]),
        ("'_proj', '__all__', '_', x.__dict__, x.y", []),
    ],
)
def test_the_search_finds_every_way_to_name_one(code, names):
    assert [name for node in ast.walk(ast.parse(code)) for name in mentioned(node) if is_private(name)] == names


@pytest.mark.parametrize("name", [*DECLARED, *SUPPORTED, *PLANS])
def test_llama_still_declares_it(name):
    assert hasattr(LlamaForCausalLM if name in PLANS else LlamaPreTrainedModel, name)


def test_what_llama_declares_is_declared():
    """A new name, or a new spelling of an old one, shows in Llama first."""
    for kind in (LlamaPreTrainedModel, LlamaForCausalLM):
        (tree,) = ast.parse(inspect.getsource(kind)).body
        names = {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
        assert {name for name in names if is_private(name)} <= {*DECLARED, *SUPPORTED, *PLANS}


def test_generation_still_calls_its_hooks(monkeypatch):
    called = set()
    for name in HOOKS:
        hook = getattr(MiniLLMGenerationMixin, name)
        record = lambda *args, hook=hook, name=name, **kwargs: called.add(name) or hook(*args, **kwargs)  # noqa: E731
        monkeypatch.setattr(MiniLLMGenerationMixin, name, record)
    model = loud_model(tiny_config(attention_type="prefix"))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "prompt_lookup_num_tokens": 2}
    model.generate(torch.full((1, 4), 5), **options)
    assert called == set(HOOKS)


def test_the_kernels_of_experts_call_our_gate():
    model = loud_model(tiny_config(mlp_type="moe", num_local_experts=4, hidden_act="gtu"))
    ids, found = torch.arange(3, 11)[None], []
    for kernel in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(kernel)
        with torch.no_grad():
            found.append(model(ids).logits)
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], atol=1e-5 * found[0].abs().max().item(), rtol=0)


def test_the_kept_operators_of_attention_are_there():
    for name in checkpointing.ATTENTION:
        assert hasattr(torch.ops.aten, name), name
