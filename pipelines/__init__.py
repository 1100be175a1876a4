"""The Beam jobs and the command line over fusion_core."""
