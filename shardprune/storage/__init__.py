"""Files on any storage, text and tensors in them, and the journal of a run."""
