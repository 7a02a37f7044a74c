"""Which CPUs a machine has, and which of them each rank gets."""
