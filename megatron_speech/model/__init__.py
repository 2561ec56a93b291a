"""The language model: megatron-core GPT with packed documents, a chunked head and a KV cache."""
