"""Who owns weights and optimiser: one process alone, or DeepSpeed's ZeRO over many."""
