"""From a checkpoint to speech: sampling restricted to legal ids, batched decoding with a KV cache."""
