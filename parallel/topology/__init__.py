"""The CPUs of a machine, and those that each rank gets."""
