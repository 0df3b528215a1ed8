"""A tool call: reading it from a model's text, checking it against a tool's schema, comparing two of them.

Text from a model is data: it is parsed as JSON (or as a Python call through `ast`), never evaluated.
"""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """One call of a tool: its name and its arguments, as JSON values."""
    name: str
    arguments: dict = field(default_factory=dict)
