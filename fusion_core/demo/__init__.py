"""Captioned scenes, shards of them, and a small CLIP that reads them."""
