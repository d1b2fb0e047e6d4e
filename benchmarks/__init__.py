"""Measurements, each printed as a table of a page of docs/: `python -m benchmarks.NAME --help`.

clients           outputs of every kind in transformers, vLLM, CTranslate2, OpenVINO, llama.cpp: sizes, logits, CPU time
digests           what the digests of tensors and the stamps of files take of a run
distillation      stored predictions of a teacher beside a live one: losses, perplexity, CPU seconds and bytes
expert_memory     peak memory of a worker that removes experts, beside the plan
experts           perplexity of mixtures that keep some experts, for every score
gpu               checks and measurements on one GPU, in one command (`make gpu`)
layer_70b         one layer of Llama-70B shape on one GPU, step by step
launches          what one layer asks of a GPU, counted on a simulated one, and the seconds that this makes
masks             perplexity of methods, allocations and rebuilt masks
packed_attention  attention of packed rows by examples, beside the mask of tokens by tokens
paths             ways to choose MoP's path, each fine-tuned afterwards
peers             SparseGPT of llm-compressor and ours in turn; the floor that the operations give
propagation       parallel propagation against exact: seconds and perplexity
quality           every part of what is done to the weights that stay, alone and together, by sparsity and text
real_widths       one layer at the width of a large model through the command, its peak memory beside the plan
rebuilding        what outlier ratios and rebuilt masks cost beside pruning
reconstruction    other ways to train the weights that layers keep, beside that of `--reconstruct`
recovery          perplexity before and after fine-tuning, and the zeros that stay
same_bits         outputs of two checkouts of the code, compared to the bit
searching         a MoP search on one worker and on several
segments          what parallel propagation costs in perplexity with more and more segments
solver            SparseGPT on one projection against the column-by-column formulation
streamed_memory   peak memory of a worker that streams a model larger than itself
structured        perplexity and latency of shallower and narrower models
training_memory   predicted and measured memory of fine-tunings of many kinds, each in processes of its own
writing_behind    the prune step with layers' files written behind the next layer, and at once
"""
