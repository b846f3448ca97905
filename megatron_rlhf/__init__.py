"""InstructGPT's three steps on Megatron-Core."""

__version__ = "0.1.0"
