"""Items to vectors: encoders, a store keyed by content, and the exact search over what they made."""
