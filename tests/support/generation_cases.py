"""What tests of generation share."""

from transformers import (
    CompileConfig,
)
from transformers.generation.streamers import BaseStreamer


def compile_eagerly():
    """The decoding step as one graph without breaks, on CPU too, where generate() compiles nothing by itself."""
    compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    return compile_config


class CollectingStreamer(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces += value.flatten().tolist()

    def end(self):
        self.ended = True
