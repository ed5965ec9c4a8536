"""One graph for batches and texts of any size: compiled or exported on one shape, equal to eager on others."""

import onnxruntime
import pytest
import torch
from torch.export import Dim
from transformers import DynamicCache, GenerationConfig
from transformers.integrations.executorch import convert_and_export_with_cache
from variant_cases import VARIANTS, config_of, inputs_of, make_loud, tokens
from variants import variants

from minillm import (
    MiniLLMForCausalLM,
    MiniLLMForQuestionAnswering,
    MiniLLMForSequenceClassification,
    MiniLLMForTokenClassification,
)

BY_LENGTH = variants("rope_dynamic rope_longrope")
NAMES = [*VARIANTS, *BY_LENGTH]
GENERATIVE = [name for name in NAMES if name != "bidirectional-none"]
SHAPES = [(3, 200), (1, 9)]
"""The first is longer than what attention on CPU takes in one block."""


def build(name):
    torch.manual_seed(0)
    fields = {"max_position_embeddings": 256, **BY_LENGTH.get(name, {})}
    return make_loud(MiniLLMForCausalLM(config_of("causal" if name in BY_LENGTH else name, **fields)))


def plain(config, batch, length):
    return {"input_ids": tokens(batch, length)}


def padded(config, batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 4] = 0
    inputs = inputs_of(config, prefix_length=length // 2, batch=batch, length=length)
    return {**{name: part.contiguous() for name, part in inputs.items()}, "attention_mask": mask}


def packed(config, batch, length):
    documents = (torch.arange(length) > length // 2).long().expand(batch, -1).contiguous()
    inputs = inputs_of(config, prefix_length=length // 4, batch=batch, length=length)
    inputs.pop("block_position_ids", None)
    return {**{name: part.contiguous() for name, part in inputs.items()}, "document_ids": documents}


def packed_by_positions(config, batch, length):
    positions = torch.arange(length) % (length // 2)
    return {"input_ids": tokens(batch, length), "position_ids": positions.expand(batch, -1).contiguous()}


EVERY_KIND = ("causal", "prefix-alibi", "window-gqa")
CASES = [(name, kind) for name in NAMES for kind in (padded, packed)]
CASES += [(name, kind) for name in EVERY_KIND for kind in (plain, packed_by_positions)]
# Every variant in one way, and three in each: files of ONNX are made from what `torch.export` makes, strict or not.
FEWER = [(name, kind) for name, kind in CASES if name in EVERY_KIND or kind is packed]


def each_case(*quick, cases=CASES):
    """Every case, of which all but the `quick` ones are slow."""
    return pytest.mark.parametrize(
        ("name", "kind"),
        [pytest.param(*case, marks=[] if case in quick else [pytest.mark.slow]) for case in cases],
        ids=lambda part: part if isinstance(part, str) else part.__name__,
    )


@torch.no_grad()
def assert_equals_eager(model, kind, run, shapes=SHAPES):
    """`run` gets the inputs by name, and returns the logits [batch, length, vocabulary]."""
    for shape in shapes:
        inputs = kind(model.config, *shape)
        real = inputs.get("attention_mask", torch.ones(*shape)).bool()
        expected = model(**inputs, use_cache=False).logits[real]
        torch.testing.assert_close(run(inputs)[real], expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def dynamic(names):
    # The same symbols for all inputs.
    batch, length = Dim("batch", min=1, max=8), Dim("length", min=2, max=256)
    return {name: {0: batch, 1: length} for name in names}


@each_case(("prefix-alibi", packed))
def test_compiled(name, kind):
    model, graphs = build(name), []
    torch.compiler.reset()

    def counted(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counted, fullgraph=True, dynamic=True)
    shapes = [(2, 24), SHAPES[0], (4, 31)]
    assert_equals_eager(model, kind, lambda inputs: compiled(**inputs, use_cache=False).logits, shapes)
    # Short texts may be worked through otherwise where a window hides nothing of them.
    assert len(graphs) == 1
    torch.compiler.reset()


ONES = torch.ones(tokens().shape, dtype=torch.long)
COUNTED = torch.arange(tokens().shape[1]).expand_as(ONES).contiguous()
LOWER = torch.ones(*ONES.shape, ONES.shape[1], dtype=torch.bool).tril()[:, None]
# (head, further fields, inputs that the first calls did not have)
NEW_INPUTS = {
    "mask": (MiniLLMForCausalLM, {}, {"attention_mask": ONES}),
    "own_mask": (MiniLLMForCausalLM, {}, {"attention_mask": LOWER}),
    "document_ids": (MiniLLMForCausalLM, {}, {"document_ids": ONES}),
    "document_ids_of_one_row": (MiniLLMForCausalLM, {}, {"document_ids": ONES[:1]}),
    "position_ids": (MiniLLMForCausalLM, {}, {"position_ids": COUNTED}),
    "prefix_mask": (MiniLLMForCausalLM, {}, {"prefix_mask": (COUNTED < 4).long()}),
    "labels": (MiniLLMForCausalLM, {}, {"labels": tokens()}),
    "logits_to_keep": (MiniLLMForCausalLM, {}, {"logits_to_keep": COUNTED >= 4}),
    "rows_of_logits": (MiniLLMForCausalLM, {}, {"logits_to_keep": ONES[:, :2]}),
    "class": (MiniLLMForSequenceClassification, {"num_labels": 3}, {"labels": ONES[:, 0]}),
    "classes": (MiniLLMForSequenceClassification, {"num_labels": 3}, {"labels": torch.eye(3)[:2]}),
    "token_classes": (MiniLLMForTokenClassification, {"num_labels": 3}, {"labels": ONES}),
    "answers": (MiniLLMForQuestionAnswering, {}, {"start_positions": ONES[:, 0], "end_positions": ONES[:, 0]}),
}


@pytest.mark.mostly_thorough("prefix_mask", "rows_of_logits")
@pytest.mark.parametrize("case", NEW_INPUTS)
@torch.no_grad()
def test_an_input_that_is_new_to_a_compiled_model(case):
    """Sizes that changed are symbols in its graph, and those of the new input are numbers."""
    head, fields, inputs = NEW_INPUTS[case]
    model = make_loud(head(config_of("prefix", num_hidden_layers=1, **fields)))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for shape in [(3, 5), (4, 6)]:
        compiled(input_ids=tokens(*shape), use_cache=False)
    expected = model(input_ids=tokens(), use_cache=False, **inputs)
    got = compiled(input_ids=tokens(), use_cache=False, **inputs)
    torch.testing.assert_close(got.to_tuple(), expected.to_tuple(), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@each_case(("causal", padded), ("prefix-alibi", packed))
def test_exported(name, kind):
    assert_exported_equals_eager(name, kind, strict=False)


@each_case(("causal", padded), ("prefix-alibi", packed), cases=FEWER)
def test_exported_strictly(name, kind):
    assert_exported_equals_eager(name, kind, strict=True)


def assert_exported_equals_eager(name, kind, strict):
    model = build(name)
    inputs = kind(model.config, 2, 24)
    shapes = {**dynamic(inputs), "use_cache": None}
    exported = torch.export.export(model, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes, strict=strict)
    module = exported.module()
    assert_equals_eager(model, kind, lambda inputs: module(**inputs, use_cache=False).logits)


class Logits(torch.nn.Module):
    """What an ONNX file takes and gives: tensors by position."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs):
        return self.model(**dict(zip(self.names, inputs, strict=True)), use_cache=False).logits


@each_case(("prefix-alibi", packed), cases=FEWER)
def test_onnx(name, kind, tmp_path):
    model = build(name)
    if name == "moe":
        # transformers' own products over groups are unknown to ONNX, in Mixtral too.
        model.set_experts_implementation("batched_mm")
    inputs = kind(model.config, 2, 24)
    program = torch.onnx.export(
        Logits(model, list(inputs)).eval(),
        tuple(inputs.values()),
        dynamo=True,
        dynamic_shapes=(tuple(dynamic(inputs).values()),),
        input_names=list(inputs),
        output_names=["logits"],
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")

    def run(inputs):
        return torch.from_numpy(session.run(None, {name: part.numpy() for name, part in inputs.items()})[0])

    assert_equals_eager(model, kind, run)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "alibi" else [pytest.mark.slow]) for name in GENERATIVE]
)
@torch.no_grad()
def test_exported_with_a_static_cache(name):
    model, length = build(name), 20
    cache = {"batch_size": 1, "max_cache_len": 32, "device": "cpu"}
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", max_length=32, cache_config=cache
    )
    step = convert_and_export_with_cache(model).module()
    ids = tokens(1, length)
    got = [step(input_ids=ids[:, at : at + 1], cache_position=torch.tensor([at])) for at in range(length)]
    past, expected = None, []
    for at in range(length):
        output = model(ids[:, at : at + 1], past_key_values=past, use_cache=True)
        past = output.past_key_values if hasattr(output, "past_key_values") else output.cache
        expected.append(output.logits)
    expected = torch.cat(expected, 1)
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "prefix-alibi" else [pytest.mark.slow]) for name in GENERATIVE]
)
@torch.no_grad()
def test_steps_of_decoding_share_a_graph(name):
    """The first step and one for every later length, padded rows included."""
    model, graphs, caches = build(name), [], []
    torch.compiler.reset()

    def counted(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counted, fullgraph=True)
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    if model.config.sliding_window is None:
        mask[0, :2] = 0
    for _ in range(2):
        caches.append(DynamicCache(config=model.config))
        model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=caches[-1], use_cache=True)
    for end in range(6, 15):
        inputs = {"input_ids": ids[:, end - 1 : end], "attention_mask": mask[:, :end].contiguous(), "use_cache": True}
        expected = model(**inputs, past_key_values=caches[0]).logits
        got = compiled(**inputs, past_key_values=caches[1]).logits
        torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert len(graphs) <= 2
    torch.compiler.reset()
