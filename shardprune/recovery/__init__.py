"""Fine-tuning that recovers the quality of a pruned model: the processes of a training run, without Ray."""
