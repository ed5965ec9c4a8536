"""The lean loop of greedy decoding and sampling gives what transformers' own loop gives, and gives way to it where it
must."""

import pytest
import torch
from matrix_cases import loud_model, tiny_config
from transformers import CompileConfig, DynamicCache, TextStreamer
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from minillm import MiniLLMForCausalLM, decoding

VARIANTS = {
    "causal": {},
    "prefix": {"attention_type": "prefix"},
    "alibi": {"position_embedding_type": "alibi"},
    "prefix alibi": {"attention_type": "prefix", "position_embedding_type": "alibi"},
    "window": {"sliding_window": 4},
    "learned": {"position_embedding_type": "learned"},
    "glm_2d": {"attention_type": "prefix", "position_embedding_type": "glm_2d"},
    "glm alibi": {"attention_type": "prefix", "position_embedding_type": "alibi"},
    "rope_2d": {"attention_type": "prefix", "rope_2d": True},
    "moe": {"mlp_type": "moe", "num_local_experts": 4},
}
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 5, "temperature": 0.8},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "static": {"cache_implementation": "static"},
    "output": {"return_dict_in_generate": True},
    "short": {"max_new_tokens": 1},
}


def prompts(variant, padded):
    """Two prompts, of which the first is padded on the left; those of GLM end in a span that has begun."""
    ids = torch.randint(3, 19, (2, 7), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids}
    if padded:
        inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    if variant.startswith(("glm", "rope_2d")):
        inputs["prefix_mask"] = torch.tensor([[1] * 5 + [0] * 2] * 2)
        inputs["position_ids"] = torch.tensor(
            [[0, 0, 0, 1, 2, 1, 1] if padded else [0, 1, 2, 3, 4, 2, 2]] + [[*range(5), 3, 3]]
        )
        inputs["block_position_ids"] = torch.tensor([[0] * 5 + [1, 2]] * 2)
        if padded:
            inputs["prefix_mask"][0, :2] = 0
    return inputs


@pytest.fixture
def both_loops(monkeypatch):
    """Runs a call with the lean loop, which must be the one that runs, and with transformers' own."""
    ran = []
    lean = decoding.sample
    monkeypatch.setattr(decoding, "sample", lambda *args, **kwargs: ran.append(1) or lean(*args, **kwargs))

    def run(call):
        torch.manual_seed(0)
        found = call()
        after = torch.rand(1)
        assert len(ran) == 1
        monkeypatch.setattr(decoding, "why_stock_loop", lambda *args: "the test wants it")
        torch.manual_seed(0)
        expected = call()
        assert len(ran) == 1
        assert torch.equal(after, torch.rand(1)), "random numbers were used otherwise"
        return found, expected

    return run


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_loop_of_transformers(variant, way, padded, both_loops):
    model = loud_model(tiny_config(max_position_embeddings=64, **VARIANTS[variant]))
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": [1, 2], **WAYS[way]}
    found, expected = both_loops(lambda: model.generate(**prompts(variant, padded), **options))
    if way == "output":
        assert found.keys() == expected.keys()
        for own, stock in zip(found.values(), expected.values(), strict=True):
            if isinstance(own, torch.Tensor):
                assert torch.equal(own, stock)
            else:
                assert own.get_seq_length() == stock.get_seq_length()
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)


def steps_taken(model, monkeypatch):
    """A list that gets an entry for each forward pass from now on."""
    steps = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: steps.append(1) or forward(*args, **kwargs))
    return steps


@pytest.mark.parametrize("every", [1, 2, 5, 100])
@pytest.mark.parametrize("way", ["greedy", "sampled"])
@pytest.mark.parametrize("variant", ["causal", "prefix alibi"])
def test_asking_late_whether_texts_have_ended_changes_nothing(variant, way, every, monkeypatch):
    model = loud_model(tiny_config(max_position_embeddings=64, **VARIANTS[variant]))
    inputs = {**prompts(variant, True), "do_sample": False, "pad_token_id": 0, **WAYS[way]}
    torch.manual_seed(1)
    texts = model.generate(**inputs, max_new_tokens=12, eos_token_id=-1)[:, 7:]
    ends = {int(texts[0, 2]), int(texts[1, 5])}
    monkeypatch.setitem(decoding.STEPS_PER_READ, "cpu", every)
    options = {"max_new_tokens": 30, "eos_token_id": sorted(ends)}
    steps = steps_taken(model, monkeypatch)
    torch.manual_seed(1)
    found, after = model.generate(**inputs, **options), torch.rand(1)
    taken = len(steps)
    monkeypatch.setattr(decoding, "why_stock_loop", lambda *args: "the test wants it")
    torch.manual_seed(1)
    expected, after_stock = model.generate(**inputs, **options), torch.rand(1)
    assert torch.equal(found, expected)
    assert torch.equal(after, after_stock)
    generated = expected.shape[1] - 7
    assert 1 < generated < 12
    assert taken == min(-(-generated // every) * every, 30)


def test_a_cache_goes_on_as_after_the_loop_of_transformers(both_loops, monkeypatch):
    monkeypatch.setitem(decoding.STEPS_PER_READ, "cpu", 5)
    model = loud_model(tiny_config(max_position_embeddings=64))
    ids = prompts("causal", False)["input_ids"]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": -1}

    def call():
        cache = DynamicCache(config=model.config)
        first = model.generate(ids, past_key_values=cache, max_new_tokens=4, **options)
        assert cache.get_seq_length() == first.shape[1] - 1
        return cache, first

    (cache, first), (stock_cache, stock_first) = both_loops(call)
    assert torch.equal(first, stock_first)
    more = torch.cat((first, torch.full((2, 1), 5)), dim=1)
    assert torch.equal(
        model.generate(more, past_key_values=cache, max_new_tokens=4, **options),
        model.generate(more, past_key_values=stock_cache, max_new_tokens=4, **options),
    )


class EndsAt(StoppingCriteria):
    """Ends the first text at some length, the second one later."""

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        return torch.tensor([input_ids.shape[1] >= 9, input_ids.shape[1] >= 11])


def test_own_stopping_criteria(both_loops):
    model = loud_model(tiny_config(max_position_embeddings=64))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    inputs = prompts("causal", False)
    found, expected = both_loops(
        lambda: model.generate(**inputs, **options, stopping_criteria=StoppingCriteriaList([EndsAt()]))
    )
    assert torch.equal(found, expected)
    assert found.shape[1] == 11


class Counts(LogitsProcessor):
    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores


@pytest.mark.parametrize("asked_by", ["processor", "criterion", "nested criterion", "prefix_allowed_tokens_fn"])
def test_nobody_is_asked_about_a_text_that_has_ended(asked_by, both_loops, monkeypatch):
    monkeypatch.setitem(decoding.STEPS_PER_READ, "cpu", 16)
    model = loud_model(tiny_config(max_position_embeddings=64))
    # Whatever comes after three tokens ends a text.
    options = {"max_new_tokens": 20, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options["eos_token_id"] = list(range(3, 19))
    going_on = torch.zeros(2, dtype=torch.bool)

    def call():
        counts = Counts()

        class Criterion(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return counts(input_ids, going_on)

        extra = {
            "processor": {"logits_processor": LogitsProcessorList([counts])},
            "criterion": {"stopping_criteria": StoppingCriteriaList([Criterion()])},
            "nested criterion": {
                "stopping_criteria": StoppingCriteriaList([StoppingCriteriaList([Criterion()])]),
            },
            "prefix_allowed_tokens_fn": {
                "prefix_allowed_tokens_fn": lambda row, ids: counts(ids[None], list(range(19))),
            },
        }[asked_by]
        return counts.lengths, model.generate(**prompts("causal", False), **options, **extra)

    (lengths, found), (stock_lengths, expected) = both_loops(call)
    assert torch.equal(found, expected)
    assert lengths == stock_lengths
    assert found.shape[1] < 27


def test_no_step_is_taken_when_the_time_is_up(monkeypatch):
    monkeypatch.setitem(decoding.STEPS_PER_READ, "cpu", 16)
    model = loud_model(tiny_config(max_position_embeddings=64))
    steps = steps_taken(model, monkeypatch)
    inputs = prompts("causal", False)
    model.generate(**inputs, max_new_tokens=20, max_time=0.0, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert len(steps) == 1


def test_a_text_that_has_ended_needs_no_token_to_draw(both_loops, monkeypatch):
    monkeypatch.setitem(decoding.STEPS_PER_READ, "cpu", 16)
    model = loud_model(tiny_config(max_position_embeddings=64))
    # Nothing may come twice: 5 and the end are left, and when they are there nothing is.
    ids = torch.tensor([[token for token in range(19) if token not in (2, 5)]])
    options = {"max_new_tokens": 20, "do_sample": True, "no_repeat_ngram_size": 1, "pad_token_id": 0}
    found, expected = both_loops(lambda: model.generate(ids, eos_token_id=2, **options))
    assert torch.equal(found, expected)
    assert found[0, -1] == 2


def test_dropout_draws_no_more_than_in_the_loop_of_transformers(both_loops, monkeypatch):
    monkeypatch.setitem(decoding.STEPS_PER_READ, "cpu", 16)
    model = loud_model(tiny_config(max_position_embeddings=64, hidden_dropout=0.2)).train()
    options = {"max_new_tokens": 20, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    options["eos_token_id"] = list(range(3, 19))
    found, expected = both_loops(lambda: model.generate(**prompts("causal", False), **options))
    assert torch.equal(found, expected)
    assert found.shape[1] < 20


class Recorder(TextStreamer):
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


def test_streamer_gets_the_same(both_loops):
    model = loud_model(tiny_config(max_position_embeddings=64))
    ids = prompts("causal", False)["input_ids"][:1]

    def call():
        recorder = Recorder()
        model.generate(ids, streamer=recorder, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)
        return recorder.got

    found, expected = both_loops(call)
    assert found == expected
    assert len(found) == 7


def test_compiled_step():
    model = loud_model(tiny_config(max_position_embeddings=64))
    inputs = prompts("causal", True)
    compiling = CompileConfig(backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    plain = model.generate(**inputs, **options)
    calls = []
    compiled = model.get_compiled_call
    model.get_compiled_call = lambda *args: calls.append(1) or compiled(*args)
    found = model.generate(**inputs, **options, compile_config=compiling)
    assert calls
    assert torch.equal(found, plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_cache": False}, "no cache"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds"),
    ],
)
def test_gives_way_with_a_reason(options, words, monkeypatch):
    reasons = []
    why = decoding.why_stock_loop
    monkeypatch.setattr(decoding, "why_stock_loop", lambda *args: reasons.append(why(*args)) or reasons[-1])
    model = loud_model(tiny_config())
    prompt = {} if "inputs_embeds" in options else {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    model.generate(**prompt, **options, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert len(reasons) == 1
    assert words in reasons[0]


def test_gives_way_to_replaced_hooks():
    model = loud_model(tiny_config())
    ids = torch.ones(1, 3, dtype=torch.long)
    calls = []
    prepare = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: calls.append(1) or prepare(*args, **kwargs)
    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert len(calls) == 4


def test_the_loop_of_transformers_is_still_called_so():
    """What the lean loop builds on is there in every supported version."""
    for name in (
        "_sample",
        "_prefill",
        "_valid_auto_compile_criteria",
        "get_compiled_call",
        "_optimize_model_for_decode",
    ):
        assert callable(getattr(MiniLLMForCausalLM, name)), name
