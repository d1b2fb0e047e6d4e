"""`shardprune plan-recovery`: what a training will take, before it starts."""
