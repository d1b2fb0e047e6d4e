"""The story of every command that makes or measures a model."""
