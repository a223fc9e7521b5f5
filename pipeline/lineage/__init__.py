"""Lineage: which images, settings, code and runs made a published encoder, by ML Metadata and the model's card."""
