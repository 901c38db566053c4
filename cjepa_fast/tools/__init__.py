"""Commands that look over several layers: doctor, plan, report, ablate."""
