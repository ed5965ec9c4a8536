"""What a stranger does with saved folders: run in a process of its own, in which `minillm` cannot be imported.

    python stranger.py CASES.json     [{"folder": ..., "auto_class": ..., "expected": FILE or null}, ...]

Loads each folder with `trust_remote_code=True`, compares with the expected tensors, saves it again, and loads that
second-hand copy. Prints one JSON line of results.
"""

import json
import sys

import torch
import transformers
from safetensors.torch import load_file


def outputs_of(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All floating-point outputs of a forward, and greedy ids where the model generates."""
    with torch.no_grad():
        result = model(**inputs)
    found = {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}
    if model.can_generate():
        found["generated"] = model.generate(inputs["input_ids"], max_new_tokens=6, do_sample=False)
    return found


def check_model(case: dict) -> str:
    auto_class = getattr(transformers, case["auto_class"])
    expected = load_file(case["expected"])
    inputs = {name.removeprefix("input:"): expected.pop(name) for name in list(expected) if name.startswith("input:")}
    folder = case["folder"]
    for _ in range(2):
        model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
        if "minillm" in {type(model).__module__.partition(".")[0]}:
            return "loaded from the installed package"
        got = outputs_of(model, inputs)
        for name, value in expected.items():
            if not torch.equal(got[name], value):
                return f"{name} differs by {(got[name].float() - value.float()).abs().max()} from {folder}"
        folder = f"{case['folder']}-again"
        model.save_pretrained(folder)
    return "equal"


def check_tokenizer(case: dict) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(case["folder"], trust_remote_code=True)
    tokenizer.save_pretrained(f"{case['folder']}-again")
    again = transformers.AutoTokenizer.from_pretrained(f"{case['folder']}-again", trust_remote_code=True)
    ids = [loaded(case["text"])["input_ids"] for loaded in (tokenizer, again)]
    named = [(loaded.gmask_token_id, loaded.pad_token_id) for loaded in (tokenizer, again)]
    return "equal" if ids == [case["ids"]] * 2 and named[0] == named[1] == tuple(case["named"]) else str((ids, named))


def check_fill(case: dict) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(case["folder"], trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(case["folder"], trust_remote_code=True).eval()
    filling = model.fill(case["text"], tokenizer, max_new_tokens=6, do_sample=False)
    scores = model.score_fills(case["text"], case["candidates"], tokenizer).tolist()
    inputs = dict(tokenizer.build_glm_inputs(case["text"], case["candidates"][:1]))
    found = [filling.texts, scores, inputs]
    return "equal" if found == case["found"] else str(found)


def check_config(case: dict) -> str:
    config = transformers.AutoConfig.from_pretrained(case["folder"], trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    changed = transformers.AutoConfig.from_pretrained(case["folder"], trust_remote_code=True, **case["change"])
    for name, value in case["followed"].items():
        if getattr(changed, name) != value:
            return f"{name} is {getattr(changed, name)} after {case['change']}"
    return "equal" if model.num_parameters() == case["parameters"] else str(model.num_parameters())


def check_tuning(case: dict) -> str:
    """Whether what is set on the model of a folder decides how its code works."""
    model = transformers.AutoModelForCausalLM.from_pretrained(case["folder"], trust_remote_code=True).eval()
    ids = torch.arange(5, 17)[None]

    def capacity() -> int:
        """Tokens that the cache has memory for, after 13 of them."""
        with torch.no_grad():
            outputs = model(ids, use_cache=True)
            cache = outputs["cache" if "cache" in outputs else "past_key_values"]
            model(ids[:, :1], past_key_values=cache)
        return cache.layers[0].keys.untyped_storage().nbytes() // cache.layers[0].keys[:, :, 0].nbytes

    found = [capacity()]
    model.tuning.growing_elements, model.tuning.least_room = 0, 7
    found.append(capacity())
    try:
        model.tuning.least_rom = 1
    except AttributeError as error:
        found.append("least_room" in str(error))
    return "set" if found == [13, 20, True] else str(found)


def main() -> None:
    sys.modules["minillm"] = None
    checks = {"AutoTokenizer": check_tokenizer, "AutoConfig": check_config, "fill": check_fill, "tuning": check_tuning}
    with open(sys.argv[1], encoding="utf-8") as file:
        cases = json.load(file)
    print(json.dumps({case["name"]: checks.get(case["auto_class"], check_model)(case) for case in cases}))


if __name__ == "__main__":
    main()
