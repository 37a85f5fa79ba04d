"""The OpenAI-compatible HTTP surface: wire shapes, validation, streaming."""
