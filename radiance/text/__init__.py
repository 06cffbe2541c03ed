"""Text encoders, and embeddings that are stored on disk."""
