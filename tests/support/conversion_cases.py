"""What the tests of conversion share: native models in folders, and their logits."""

import json

import torch
from native_families import native_model

IDS = torch.tensor([[3, 9, 4, 33, 21, 7]])


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def save_native(folder, name="llama_gqa_tied", **options):
    native = native_model(name)
    native.save_pretrained(folder, **options)
    return native


def edit_json(path, **changes):
    content = json.loads(path.read_text("utf-8"))
    for key, value in changes.items():
        content.pop(key, None) if value is ... else content.update({key: value})
    path.write_text(json.dumps(content), "utf-8")
