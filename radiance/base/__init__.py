"""Errors, files, images, random streams, settings, tables and trees: the foundation of the rest."""
