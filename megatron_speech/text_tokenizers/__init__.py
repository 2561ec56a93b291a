"""Text tokenizers for new scripts: trained on any text stream, extended after their own ids, and measured."""
