"""What is refused is refused in a traced graph as well: when it is traced if the config or the back end says so, by an
assertion in the graph if a value does."""

import pytest
import torch
from variant_cases import LENGTH, VOCAB, model_of, tokens

PLAIN = torch.arange(LENGTH).expand(2, -1).contiguous()
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2)
PREFIX = torch.tensor([[1, 1, 1, 0, 0, 2, 2, 0, 0, 0]] * 2)
HOLE = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1]] * 2)
# (variant, back end, inputs that are right, the same with one that is not, what is said of it)
BY_VALUE = {
    "packed_by_positions": (
        "causal",
        "my_kernel",
        {"position_ids": PLAIN},
        {"position_ids": PACKED},
        "restart|documents, on cpu",
    ),
    "negative_positions": ("alibi", "sdpa", {"position_ids": PLAIN}, {"position_ids": PLAIN - 1}, "negative"),
    "beyond_the_table": ("gpt2", "sdpa", {"position_ids": PLAIN}, {"position_ids": PLAIN + 30}, "position_table_size"),
    "second_axis": (
        "prefix-glm_2d",
        "sdpa",
        {"block_position_ids": PLAIN},
        {"block_position_ids": PLAIN + 30},
        "block_position_ids",
    ),
    "broken_prefix": (
        "prefix",
        "sdpa",
        {"prefix_mask": PREFIX},
        {"prefix_mask": (PREFIX > 0).long()},
        "comes back",
    ),
    "negative_prefix": ("prefix", "sdpa", {"prefix_mask": PREFIX}, {"prefix_mask": -PREFIX}, "negative"),
    "falling_documents": (
        "causal",
        "sdpa",
        {"document_ids": HOLE.cumsum(-1)},
        {"document_ids": HOLE},
        "decrease",
    ),
    "numbers_in_the_mask": (
        "causal",
        "sdpa",
        {"attention_mask": HOLE},
        {"attention_mask": HOLE * 2},
        "other values than 0",
    ),
    "padding_in_a_window": (
        "window-gqa",
        "sdpa",
        {"attention_mask": HOLE.cummin(-1).values},
        {"attention_mask": HOLE},
        "sliding_window",
    ),
    "labels": ("causal", "sdpa", {"labels": tokens()}, {"labels": tokens() + VOCAB}, "labels"),
}


@pytest.fixture(autouse=True)
def nothing_compiled_is_left(my_kernel):
    yield
    torch.compiler.reset()


def hold(compiled, model, right, wrong, message):
    with torch.no_grad():
        expected = model(tokens(), use_cache=False, **right).logits
        torch.testing.assert_close(compiled(tokens(), use_cache=False, **right).logits, expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(RuntimeError, match=message):
            compiled(tokens(), use_cache=False, **wrong)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", BY_VALUE)
def test_a_value_is_refused_in_a_compiled_model(case, compiler):
    variant, back_end, right, wrong, message = BY_VALUE[case]
    model = model_of(variant)
    model.set_attn_implementation(back_end)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(tokens(), **wrong)
    hold(torch.compile(model, backend=compiler, fullgraph=True), model, right, wrong, message)


@pytest.mark.parametrize("case", BY_VALUE)
def test_a_value_is_refused_in_an_exported_model(case):
    variant, back_end, right, wrong, message = BY_VALUE[case]
    model = model_of(variant)
    model.set_attn_implementation(back_end)
    with torch.no_grad():
        program = torch.export.export(model, (tokens(),), {"use_cache": False, **right}, strict=False)
    hold(program.module(), model, right, wrong, message)


@pytest.mark.parametrize(
    ("variant", "back_end", "inputs", "message"),
    [
        ("causal", "my_kernel", {"document_ids": HOLE.cumsum(-1)}, "documents"),
        ("causal", "sdpa", {"prefix_mask": PREFIX}, "attention_type='causal'"),
        ("causal", "sdpa", {"position_ids": PLAIN.float()}, "`position_ids` has dtype"),
        ("prefix", "sdpa", {"prefix_mask": PREFIX[:, :4]}, "`prefix_mask` has shape"),
        ("causal", "sdpa", {"attention_mask": HOLE[:, None, None].expand(-1, -1, LENGTH, -1)}, "is 4D and has"),
        ("causal", "sdpa", {"token_type_ids": HOLE}, "is a tensor that this model does not read"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_what_the_call_says_is_refused_while_tracing(variant, back_end, inputs, message):
    model = model_of(variant)
    model.set_attn_implementation(back_end)
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="eager", fullgraph=True)(tokens(), use_cache=False, **inputs)
    with pytest.raises(Exception, match=message):
        torch.export.export(model, (tokens(),), {"use_cache": False, **inputs}, strict=False)


def test_a_variant_assigned_later_is_refused_while_tracing():
    model = model_of("causal")
    model.set_attn_implementation("my_kernel")
    model.config.sliding_window = 3
    with pytest.raises(Exception, match="window"):
        torch.compile(model, backend="eager", fullgraph=True)(tokens(), use_cache=False)
