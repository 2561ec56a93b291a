"""Hugging Face ⇄ megatron-core: LLaMA, Qwen2 and Qwen3 folders in, folders that `transformers` loads out."""
