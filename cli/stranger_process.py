"""Run as a script by the demo: loads published folders as someone without MiniLLM does, and prints generated texts.

python stranger_process.py PROMPTS_JSON FOLDER...
"""

import json
import sys
from typing import Any


def main() -> None:
    sys.modules["minillm"] = None  # pyright: ignore[reportArgumentType]: so that it cannot be imported
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    prompts, texts = json.loads(sys.argv[1]), []
    for folder in sys.argv[2:]:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
        texts.append(tokenizer.batch_decode(ids, skip_special_tokens=True))
    print(json.dumps(texts))


if __name__ == "__main__":
    main()
