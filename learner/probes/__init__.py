"""Measurements of the model that is about to be trained, which decide the layout of its packs."""
