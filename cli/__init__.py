"""The `minillm` command."""

__all__: list[str] = []
