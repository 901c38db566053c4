"""What an encoder is worth: probes, fine-tuning, dense tasks, figures; `cjepa-eval`."""
