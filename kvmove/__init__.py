"""The face of the project: one command line that runs a scenario in either world or both, compares, and reports."""
