"""Recipes: the fields of every command, one validated class each."""
