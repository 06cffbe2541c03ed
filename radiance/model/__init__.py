"""The network: blocks, attention, modulation, heads, and the autoencoder of latent models."""
