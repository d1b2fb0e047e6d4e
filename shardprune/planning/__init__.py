"""The requirements of a run before it starts: a layout that fits, memory, traffic, seconds, and a simulation of the
run.
"""
