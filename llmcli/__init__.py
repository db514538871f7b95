"""llmcli: from plain text to a language model that runs offline on a laptop."""

__version__ = "0.1.0"
