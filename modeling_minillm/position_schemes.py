"""The position schemes by name; RoPE, which acts on queries and keys, is in `minillm.rotary`."""

from minillm.alibi import AlibiBias
from minillm.position_embeddings import glm_2d, learned, sinusoidal
from minillm.sandwich import SandwichBias

POSITION_TABLES = {"learned": ("embed_positions",), "glm_2d": ("embed_positions", "embed_block_positions")}
"""Names of the learned tables [position_table_size, hidden] that a scheme keeps on the model."""

POSITION_EMBEDDINGS = {"learned": learned, "sinusoidal": sinusoidal, "glm_2d": glm_2d}
"""Schemes that add something to the token embedding."""

POSITION_BIASES = {"alibi": AlibiBias, "sandwich": SandwichBias}
"""Schemes that act inside attention."""
