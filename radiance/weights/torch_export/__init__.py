"""Files that `radiance convert --to torch` copies to the user; they never import radiance."""
