"""A layer that grows into room holds, after any history, what transformers' layer holds; and it does not copy it."""

import copy
import pickle
import random
import types
import weakref

import pytest
import torch
from matrix_cases import loud_model, tiny_config
from training_cases import enable_checkpointing
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.executorch import register_dynamic_cache_export_support
from variants import variants

from minillm.cache import CACHE_NAME, NEVER, GrowingLayer, with_room
from minillm.tuning import tuning


@pytest.fixture(autouse=True)
def room_from_the_second_token(monkeypatch):
    monkeypatch.setattr(tuning, "growing_elements", 0)
    monkeypatch.setattr(tuning, "least_room", 3)


def states(tokens, rows=2, dtype=torch.float32):
    return [torch.randn(rows, 3, tokens, 4, dtype=dtype) for _ in range(2)]


def add(layers, tokens):
    new = states(tokens, rows=layers[1].keys.shape[0])
    for shown, expected in zip(*(layer.update(*new) for layer in layers), strict=True):
        assert torch.equal(shown, expected)


def crop(layers):
    gone = random.randint(0, layers[1].get_seq_length() - 1)
    for layer in layers:
        layer.crop(-gone)


def select(layers, choice):
    rows = torch.tensor([random.randrange(layers[1].keys.shape[0]) for _ in range(random.randint(1, 3))])
    for layer in layers:
        getattr(layer, choice)(rows)


def start_again(layers):
    new = states(4)
    layers[0].reset()
    assert layers[0].get_seq_length() == 0
    # That of transformers 5.17 keeps as many zeros.
    layers[1] = DynamicLayer()
    for layer in layers:
        layer.update(*new)


def diverge(layers, copied):
    """Copies go on by themselves: neither writes what the other shows."""
    own, stock = copied(layers[0]), copied(layers[1])
    add((own, stock), 1)
    add(layers, 2)
    add((own, stock), 2)


EVENTS = {
    "one token": lambda layers: add(layers, 1),
    "tokens": lambda layers: add(layers, random.randint(1, 9)),
    "crop": crop,
    "reorder": lambda layers: select(layers, "reorder_cache"),
    "select": lambda layers: select(layers, "batch_select_indices"),
    "repeat": lambda layers: [layer.batch_repeat_interleave(2) for layer in layers if layer.keys.shape[0] < 4],
    "shallow copy": lambda layers: diverge(layers, copy.copy),
    "deep copy": lambda layers: diverge(layers, copy.deepcopy),
    "pickle": lambda layers: diverge(layers, lambda layer: pickle.loads(pickle.dumps(layer))),
    "foreign keys": lambda layers: [setattr(layer, "keys", layer.keys.flip(0)) for layer in layers],
    "foreign values": lambda layers: [setattr(layer, "values", layer.values.flip(0)) for layer in layers],
    "start again": start_again,
}
MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)


@pytest.mark.parametrize("seed", range(20))
def test_holds_what_the_layer_of_transformers_holds(seed):
    print(f"seed {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    layers = [GrowingLayer(), DynamicLayer()]
    first = states(5)
    seen = []
    with torch.no_grad():
        for layer in layers:
            layer.update(*first)
    for _ in range(60):
        # What was handed out stays as it was, whatever comes later.
        seen.append((layers[0].keys, layers[0].keys.clone()))
        event = random.choice([*EVENTS, "one token", "one token", "tokens"])
        print(event)
        with random.choice(MODES)():
            EVENTS[event](layers)
        own, stock = layers
        assert own.get_seq_length() == stock.get_seq_length()
        assert torch.equal(own.keys, stock.keys)
        assert torch.equal(own.values, stock.values)
    assert all(torch.equal(shown, before) for shown, before in seen if shown.numel())


@torch.no_grad()
def test_a_new_token_copies_itself_alone():
    layer = GrowingLayer()
    layer.update(*states(40))
    places = set()
    for _ in range(60):
        layer.update(*states(1))
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
        assert layer.room.keys.shape[-2] <= layer.get_seq_length() * 9 / 8 + 4
    # One in eight: from 40 to 100 tokens in eight moves.
    assert len(places) <= 9


@torch.no_grad()
def test_few_keys_are_joined(monkeypatch):
    monkeypatch.setattr(tuning, "growing_elements", 2 * 3 * 4 * 6)
    layer = GrowingLayer()
    layer.update(*states(4))
    for length in (5, 6):
        layer.update(*states(1))
        assert layer.room is None, length
    layer.update(*states(1))
    assert layer.room is not None


@torch.no_grad()
@pytest.mark.parametrize(
    "other", [{"dtype": torch.bfloat16}, {"rows": 3}, {"dtype": torch.float64}], ids=["bfloat16", "rows", "float64"]
)
def test_what_does_not_fit_goes_as_in_transformers(other):
    layers = GrowingLayer(), DynamicLayer()
    for new in (states(4), states(1), states(1, **other)):
        outcomes = []
        for layer in layers:
            try:
                outcomes.append([part.clone() for part in layer.update(*new)])
            except RuntimeError as error:
                outcomes.append(str(error))
        own, stock = outcomes
        if isinstance(stock, str):
            assert own == stock
        else:
            assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(own, stock, strict=True))


def test_gradients_pass_through_a_cache_that_later_grows():
    model = loud_model(tiny_config())
    ids = torch.randint(3, 19, (2, 9), generator=torch.Generator().manual_seed(1))
    results = []
    for layers in (with_room, lambda cache: cache):
        cache = layers(DynamicCache(config=model.config))
        with torch.no_grad():
            model(ids[:, :4], past_key_values=cache)
            model(ids[:, 4:5], past_key_values=cache)
        model.zero_grad()
        # Keys stay frozen, so that attention keeps for its backward pass the very tensors that the cache shows.
        for layer in model.model.layers:
            layer.self_attn.k_proj.requires_grad_(False)
        loss = model(ids[:, 5:7], past_key_values=cache).logits.square().sum()
        with torch.no_grad():
            model(ids[:, 7:8], past_key_values=cache)
            model(ids[:, 8:], past_key_values=cache)
        loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(gradient, results[1][name]) for name, gradient in results[0].items())


def test_a_backward_pass_may_wait_for_keys_while_the_cache_grows():
    layers, gradients = (GrowingLayer(), DynamicLayer()), []
    torch.manual_seed(0)
    steps = [states(tokens) for tokens in (4, 1, 1, 1)]
    weights = torch.randn(2, 3, 1, 4)
    for layer in layers:
        query = weights.clone().requires_grad_()
        with torch.no_grad():
            for step in steps[:3]:
                layer.update(*step)
        loss = torch.nn.functional.scaled_dot_product_attention(query, layer.keys, layer.values).sum()
        with torch.no_grad():
            layer.update(*steps[3])
        loss.backward()
        gradients.append(query.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "leave",
    [
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.reset(),
        lambda layer: layer.update(*states(500)),
    ],
    ids=["select", "repeat", "reorder", "reset", "move"],
)
@torch.no_grad()
def test_memory_that_is_left_is_free(leave):
    layer = GrowingLayer()
    for tokens in (8, 1, 1):
        layer.update(*states(tokens))
    left = weakref.ref(layer.room.keys)
    leave(layer)
    assert left() is None


@torch.no_grad()
def test_an_offloaded_layer_leaves_its_room():
    layer = GrowingLayer()
    for tokens in (8, 1):
        layer.update(*states(tokens))
    assert layer.room is not None
    layer.offload()
    assert layer.room is None
    assert layer.shown is None


def layers_used(monkeypatch):
    """The layers that grow from now on, by identity."""
    used = {}
    update = GrowingLayer.update
    monkeypatch.setattr(
        GrowingLayer,
        "update",
        lambda layer, *args, **kwargs: used.setdefault(id(layer), layer) and update(layer, *args, **kwargs),
    )
    return used


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "dynamic": {"cache_implementation": "dynamic"},
}
VARIANTS = variants("causal prefix alibi gqa")


@pytest.mark.parametrize("back_end", ["sdpa", "eager"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_generates_the_same_text(variant, way, back_end, monkeypatch):
    model = loud_model(tiny_config(max_position_embeddings=64, **VARIANTS[variant]))
    model.set_attn_implementation(back_end)
    rows = 1 if "prompt_lookup_num_tokens" in WAYS[way] else 2
    ids = torch.randint(3, 19, (rows, 7), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": [1, 2], **WAYS[way]}
    used = layers_used(monkeypatch)
    torch.manual_seed(0)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert len(used) == 2
    assert all(layer.room is not None for layer in used.values())
    monkeypatch.setattr(tuning, "growing_elements", 2**62)
    torch.manual_seed(0)
    assert torch.equal(found, model.generate(ids, attention_mask=torch.ones_like(ids), **options))


def kinds_of(cache):
    return {type(layer) for layer in cache.layers}


class OwnCache(DynamicCache):
    """Somebody's own, which may do anything with its layers."""


class OwnLayer(DynamicLayer):
    """Somebody's own."""


def of_seven_tokens(cache):
    """The cache, filled for the two layers of `tiny_config`."""
    config = tiny_config()
    for index in range(2):
        cache.update(*torch.randn(2, 2, config.num_key_value_heads, 7, config.head_dim), index)
    return cache


def with_second_layer(layer):
    cache = DynamicCache(config=tiny_config())
    cache.layers[1] = layer
    return cache


def test_which_caches_get_room(monkeypatch):
    windowed = loud_model(tiny_config(sliding_window=4))
    model = loud_model(tiny_config())
    ids = torch.full((1, 3), 5)
    assert kinds_of(getattr(model(ids, use_cache=True), CACHE_NAME)) == {GrowingLayer}
    assert GrowingLayer not in kinds_of(getattr(windowed(ids, use_cache=True), CACHE_NAME))
    own = {"with config": DynamicCache(config=model.config), "without": DynamicCache()}
    for cache in own.values():
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, **{CACHE_NAME: cache})
        assert type(cache) is DynamicCache
        assert kinds_of(cache) == {GrowingLayer}
        assert all(layer.room is not None for layer in cache.layers)
    used = layers_used(monkeypatch)
    for options in ({"cache_implementation": "static"}, {"use_cache": False}, {CACHE_NAME: OwnCache()}):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, **options)
    assert not used


def test_what_is_not_an_empty_cache_stays():
    offloaded = DynamicCache(config=tiny_config())
    offloaded.offloading = True
    static = StaticCache(config=tiny_config(), max_cache_len=4)
    for cache in (offloaded, static, OwnCache(config=tiny_config()), of_seven_tokens(DynamicCache()), OwnCache()):
        before, made = list(cache.layers), cache.layer_class_to_replicate
        assert with_room(cache) is cache
        assert list(map(id, cache.layers)) == list(map(id, before))
        assert cache.layer_class_to_replicate is made
    assert with_room(None) is None
    for other in (DynamicSlidingWindowLayer(sliding_window=3), OwnLayer(), GrowingLayer()):
        cache = with_room(with_second_layer(other))
        assert type(cache.layers[0]) is GrowingLayer
        assert cache.layers[1] is other
    paged = types.SimpleNamespace(layers=None)
    assert with_room(paged) is paged


@torch.no_grad()
@pytest.mark.parametrize("empty", [lambda cache: cache.reset(), lambda cache: cache.crop(-7)], ids=["reset", "crop"])
def test_a_cache_that_was_emptied_starts_again(empty):
    model = loud_model(tiny_config())
    ids = torch.randint(3, 19, (3, 7), generator=torch.Generator().manual_seed(3))
    for cache in (DynamicCache(config=model.config), with_room(DynamicCache(config=model.config)), DynamicCache()):
        empty(of_seven_tokens(cache))
        if cache.get_seq_length():
            # transformers 5.17 resets its own layers to as many zeros.
            assert kinds_of(cache) == {DynamicLayer}
            continue
        for start, end in ((0, 4), (4, 5), (5, 7)):
            found = model(ids[:2, start:end], past_key_values=cache).logits
            torch.testing.assert_close(found, model(ids[:2, :end], use_cache=False).logits[:, start:])
        assert kinds_of(cache) == {GrowingLayer}
        assert all(layer.room is not None for layer in cache.layers)


@torch.no_grad()
def test_a_step_with_a_filled_cache_makes_no_layers():
    model = loud_model(tiny_config())
    ids = torch.full((2, 3), 5)
    for cache in (DynamicCache(config=model.config), of_seven_tokens(DynamicCache(config=model.config))):
        model(ids[:, :2], past_key_values=cache)
        layers = cache.layers
        model(ids[:, 2:], past_key_values=cache)
        assert cache.layers is layers


def test_checkpointing_leaves_a_cache_of_the_caller_alone():
    model = loud_model(tiny_config()).train()
    enable_checkpointing(model)
    ids = torch.full((2, 5), 5)
    cache = DynamicCache(config=model.config)
    loss = model(ids, labels=ids, past_key_values=cache).loss
    loss.backward()
    expected = loud_model(tiny_config()).train()
    expected(ids, labels=ids).loss.backward()
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("given", [None, DynamicCache], ids=["made by forward", "given"])
@torch.no_grad()
def test_a_graph_without_breaks_takes_an_empty_cache(given):
    torch._dynamo.reset()
    model = loud_model(tiny_config())
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    ids = torch.randint(3, 19, (2, 9), generator=torch.Generator().manual_seed(1))
    output = compiled(ids[:, :5], past_key_values=given and given(config=model.config), use_cache=True)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(output.logits, expected[:, :5])
    torch.testing.assert_close(model(ids[:, 5:], past_key_values=getattr(output, CACHE_NAME)).logits, expected[:, 5:])


@torch.no_grad()
def test_a_cache_with_room_serves_another_model_and_a_compiled_one():
    model = loud_model(tiny_config())
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in names})).eval()
    llama.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="eager", dynamic=True)
    ids = torch.randint(3, 19, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = model(ids, use_cache=False).logits
    cache = with_room(DynamicCache(config=model.config))
    for each, start, end in ((model, 0, 4), (model, 4, 5), (compiled, 5, 6), (model, 6, 8), (llama, 8, 9)):
        torch.testing.assert_close(each(ids[:, start:end], **{CACHE_NAME: cache}).logits, expected[:, start:end])
        # A compiled step joins: it would be compiled anew for each move to other room.
        assert all((layer.room is None) == (each is compiled or end == 4) for layer in cache.layers)


def test_a_cache_that_never_grows_goes_through_pytrees(monkeypatch):
    """transformers flattens caches for `torch.export`, if all of their layers are its own."""
    monkeypatch.setattr(tuning, "growing_elements", NEVER)
    register_dynamic_cache_export_support()
    model = loud_model(tiny_config(position_embedding_type="alibi"))
    ids = torch.randint(3, 19, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = getattr(model(ids[:, :5], use_cache=True), CACHE_NAME)
        leaves, structure = torch.utils._pytree.tree_flatten(cache)
        again = torch.utils._pytree.tree_unflatten(leaves, structure)
        step = {"input_ids": ids[:, 5:]}
        expected = model(**step, past_key_values=cache).logits
        torch.testing.assert_close(model(**step, past_key_values=again).logits, expected)
    assert len(leaves) == 2 * model.config.num_hidden_layers
