"""The rank that tokenizes, schedules and detokenizes."""
