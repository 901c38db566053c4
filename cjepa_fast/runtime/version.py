"""The version of this code, also written into checkpoints, reports and exports."""

VERSION = "0.2.0"
