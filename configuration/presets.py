"""Named sets of `MiniLLMConfig` fields. Data only: a name, where the numbers come from, and the fields.

`MiniLLMConfig.from_preset(name, **overrides)` builds a config from one of them; overrides win over the preset. What a
source does not say is left at its default; a token id that it does not say is None.
"""

from minillm.configuration.preset import PRESETS, Preset
from minillm.configuration.presets_glm import GLM_PRESETS
from minillm.configuration.presets_gpt import GPT_PRESETS
from minillm.configuration.presets_llama import LLAMA_PRESETS

_MINI = {
    "vocab_size": 16384,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}

_OWN = "chosen to train on a laptop"

PRESETS.update(
    {
        "minillm-causal-10m": Preset("causal decoder with RoPE, RMSNorm and SwiGLU", _OWN, _MINI),
        "minillm-prefix-10m": Preset(
            "the same with a bidirectional prefix (prefix LM)", _OWN, {**_MINI, "attention_type": "prefix"}
        ),
        "minillm-alibi-10m": Preset(
            "the same with ALiBi in place of RoPE", _OWN, {**_MINI, "position_embedding_type": "alibi"}
        ),
        **GPT_PRESETS,
        **LLAMA_PRESETS,
        **GLM_PRESETS,
    }
)
