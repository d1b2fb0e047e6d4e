"""Fine-tuning that heals a pruned model, in the processes of one training. No Ray here."""
