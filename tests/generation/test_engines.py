"""Engines that lay the tokens of several requests in one row: they keep them apart by themselves, and what they cannot
serve is refused when the model is loaded, never in a running batch."""

import ast
import inspect
import textwrap

import pytest
import torch
from matrix_cases import POSITIONS, assert_close, loud_model, tiny_config
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from variant_cases import tokens

from minillm import MiniLLMForCausalLM
from minillm.attention import MiniLLMAttention
from minillm.capabilities import refusal

BOUNDS = [(0, 3), (3, 4), (4, 10)]
REFUSED = {
    "prefix": {"attention_type": "prefix"},
    "bidirectional": {"attention_type": "bidirectional"},
    "alibi": {"position_embedding_type": "alibi"},
    "sandwich": {"position_embedding_type": "sandwich"},
    "window": {"sliding_window": 4},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "factor": 2.0,
            "original_max_position_embeddings": 8,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        }
    },
}


@pytest.fixture(params=["vllm", "sglang"])
def engine(request, monkeypatch):
    """A back end that, as engines do, knows by itself where the requests of a row begin."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        parts = [
            sdpa_attention_forward(
                module, query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], None, **kwargs
            )[0]
            for start, end in BOUNDS
        ]
        return torch.cat(parts, dim=1), None

    monkeypatch.setitem(AttentionInterface._global_mapping, request.param, attend)
    return request.param


@pytest.mark.parametrize("scheme", [name for name in POSITIONS if "alibi" not in name and name != "sandwich"])
@torch.no_grad()
def test_a_row_of_requests_equals_each_alone(engine, scheme):
    model = loud_model(tiny_config(**POSITIONS[scheme]))
    ids = tokens(batch=1)
    alone = torch.cat([model(ids[:, start:end]).logits for start, end in BOUNDS], dim=1)
    model.set_attn_implementation(engine)
    positions = torch.cat([torch.arange(end - start) for start, end in BOUNDS])[None]
    assert_close(model(ids, position_ids=positions, use_cache=False).logits, alone.double(), scheme)


@pytest.mark.parametrize("variant", REFUSED)
def test_a_variant_is_refused_when_it_is_loaded(engine, variant, tmp_path):
    loud_model(tiny_config(**REFUSED[variant])).save_pretrained(tmp_path)
    config = tiny_config(**REFUSED[variant])
    config._attn_implementation = engine
    for load in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=engine),
        lambda: AutoModel.from_pretrained(tmp_path, attn_implementation=engine),
        lambda: MiniLLMForCausalLM(config),
        lambda: loud_model(tiny_config(**REFUSED[variant])).set_attn_implementation(engine),
    ):
        with pytest.raises(ValueError, match=f"attn_implementation='{engine}' cannot serve") as caught:
            load()
        assert "vLLM" in str(caught.value) and "generate()" in str(caught.value)


@pytest.mark.parametrize("variant", REFUSED)
def test_continuous_batching_is_refused_before_a_batch_is_made(variant):
    model = loud_model(tiny_config(**REFUSED[variant]))
    # `transformers serve` asks so, and answers one request after the other where it finds nothing.
    assert not hasattr(model, "init_continuous_batching")
    options = GenerationConfig(max_new_tokens=2)
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch(inputs=[[3, 4, 5]], generation_config=options)
    with pytest.raises(ValueError, match="continuous batching"), model.continuous_batching_context_manager():
        pass


def test_continuous_batching_is_offered_where_it_is_right():
    for scheme in ("rope", "learned", "none"):
        model = loud_model(tiny_config(**POSITIONS[scheme]))
        assert hasattr(model, "init_continuous_batching") and refusal(model.config, "paged") is None


@pytest.mark.parametrize("variant", ["prefix", "alibi"])
def test_a_server_answers_request_by_request(variant):
    from transformers.cli.serving.utils import GenerationState, Modality

    state = GenerationState(continuous_batching=True)
    assert not state.use_continuous_batching(loud_model(tiny_config(**REFUSED[variant])), Modality.LLM)
    assert state.use_continuous_batching(loud_model(tiny_config()), Modality.LLM)


# --- back ends of one's own ---


@pytest.fixture
def without_mask(monkeypatch):
    """Plain causal attention, and nothing that would turn padding into a mask for it."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "my_kernel", attend)
    return "my_kernel"


@torch.no_grad()
def test_a_back_end_without_a_mask_function_is_refused_what_needs_a_mask(without_mask):
    model = loud_model(tiny_config())
    ids = tokens()
    expected = model(ids).logits
    model.set_attn_implementation(without_mask)
    assert_close(model(ids).logits, expected.double(), "plain")
    assert_close(model(ids, attention_mask=torch.ones_like(ids)).logits, expected.double(), "a mask of ones")
    for mask in (torch.tensor([[0, 0] + [1] * 8, [1] * 10]), torch.tensor([[1] * 8 + [0, 0], [1] * 10])):
        with pytest.raises(ValueError, match=r"padding.*'my_kernel' has no mask function"):
            model(ids, attention_mask=mask)
    cache = DynamicCache()
    model(ids[:, :6], past_key_values=cache)
    assert_close(model(ids[:, 6:7], past_key_values=cache).logits, expected[:, 6:7].double(), "one token")
    with pytest.raises(ValueError, match="several tokens behind cached ones"):
        model(ids[:, 7:], past_key_values=cache)
    with pytest.raises(ValueError, match="cache of fixed size"):
        model(ids, past_key_values=StaticCache(model.config, max_cache_len=12))
    model.set_attn_implementation("sdpa")
    assert_close(model(ids[:, 7:], past_key_values=cache).logits, expected[:, 7:].double(), "nothing was lost")


def test_document_ids_are_refused_by_an_engine(engine):
    model = loud_model(tiny_config())
    model.set_attn_implementation(engine)
    with pytest.raises(ValueError, match="documents"):
        model(tokens(), document_ids=torch.zeros(2, 10, dtype=torch.long))


def test_vllm_finds_the_call_of_attention_by_its_text():
    """vLLM's transformers back end reads the forward as text: exactly one call of a name that was assigned from
    `ALL_ATTENTION_FUNCTIONS`, whose `scaling` is an attribute of the module; else it refuses to load the model."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(MiniLLMAttention.forward)))
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert len(names) == 1
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    assert len(calls) == 1
    scaling = [keyword.value for keyword in calls[0].keywords if keyword.arg == "scaling"]
    assert [ast.unparse(each) for each in scaling] == ["self.scaling"]
    attention = MiniLLMForCausalLM(tiny_config()).model.layers[0].self_attn
    assert isinstance(attention.scaling, float) and isinstance(attention.layer_idx, int)


def test_a_layer_by_itself_asks_for_the_back_end_of_the_config():
    """As vLLM, which traces it, and tests of transformers call it."""
    model = loud_model(tiny_config()).eval()
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    attention, positions = model.model.layers[0].self_attn, torch.arange(5)[None]
    rotary = model.model.rotary_emb(states, positions)
    assert rotary[0].shape == rotary[1].shape == (1, 5, 8)
    visible = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    outputs = []
    for back_end in ("eager", "sdpa"):
        model.set_attn_implementation(back_end)
        outputs.append(attention(states, attention_mask=visible, position_embeddings=rotary))
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    assert outputs[0][1].shape == (1, 4, 5, 5) and outputs[1][1] is None


def test_the_rotary_embedding_and_a_layer_are_llamas():
    """Tables in the meaning that transformers gives them, so that either's may be handed to either's layer."""
    config = tiny_config(num_key_value_heads=2)
    own = loud_model(config).eval()
    names = LlamaConfig.__dataclass_fields__
    fields = {name: value for name, value in config.to_dict().items() if name in names and name != "architectures"}
    stock = LlamaForCausalLM(LlamaConfig(**{**fields, "rms_norm_eps": config.norm_eps})).eval()
    stock.load_state_dict(own.state_dict())
    states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(3, 10)[None]
    tables = own.model.rotary_emb(states, positions), stock.model.rotary_emb(states, positions)
    for found, expected in zip(*tables, strict=True):
        torch.testing.assert_close(found, expected)
    for each in tables:
        found, expected = (
            model.model.layers[0](states, position_embeddings=each, attention_mask=None) for model in (own, stock)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fields", [{}, {"position_embedding_type": "alibi"}, {"attention_type": "prefix"}], ids=str)
@pytest.mark.parametrize("length", [20, 200, 1200])
def test_a_function_of_ones_own_under_the_name_of_sdpa_is_called(fields, length, monkeypatch):
    model, calls = loud_model(tiny_config(max_position_embeddings=1200, **fields)).eval(), []
    ids = tokens(1, length)
    expected = model(ids).logits

    def own(*args, **kwargs):
        calls.append(args)
        return sdpa_attention_forward(*args, **kwargs)

    # Not `setitem(ALL_ATTENTION_FUNCTIONS, ...)`, which would leave an entry of the old function behind.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", own)
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=1e-4)
    assert len(calls) == model.config.num_hidden_layers
