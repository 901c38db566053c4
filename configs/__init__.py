"""The shipped configurations, as JSON files; installed as cjepa_fast.configs."""
