"""Files that `radiance convert --to torch` copies beside the weights; they never import radiance."""
