"""What a run is asked to do: one validated class a command."""
