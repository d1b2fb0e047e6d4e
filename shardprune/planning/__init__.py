"""What a run takes, before it starts: a layout that fits, memory, traffic, seconds, and a simulation of the run."""
