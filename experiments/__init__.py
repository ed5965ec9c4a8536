"""Studies and what they leave behind: tables, pictures and figures of a measurement."""

__all__: list[str] = []
