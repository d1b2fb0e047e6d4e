"""SparseGPT of llm-compressor and ours in turn: `python -m benchmarks.peers --peer-python PYTHON`.

cases        models and calibration tokens that both get
floor        the operations of a run, and the rate of a large product
first_layer  the cost of a process of ours before its first layer
oneshot      llm-compressor's run, in its own environment
ours         our run
"""
