"""What attention is given in a forward, without running the model."""

from minillm.back_ends import Call, attention_inputs
from minillm.checks import GivenTokens
from minillm.geometry import read_geometry
from minillm.token_facts import read_tokens


def call_of(config, inputs_embeds, cache=None, heads=None, **given):
    geometry, given = read_geometry(config, inputs_embeds, cache), GivenTokens(**given)
    return Call(config, geometry, read_tokens(config, geometry, given), given, inputs_embeds, cache, heads)


def attention_of(config, inputs_embeds, **given):
    return attention_inputs(call_of(config, inputs_embeds, **given))
