"""Who owns weights and optimiser: one rank alone, or DeepSpeed's ZeRO over many."""
