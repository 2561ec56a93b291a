"""megatron_speech: a Megatron-style training stack for speech language models."""

__version__ = "0.1.0"
