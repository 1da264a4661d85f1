"""Sentences, their dialect transformations, and the corpus they make."""
